"""TRL's trainers on a colocated SGLang server, in place of the vLLM that they start themselves.

    with tpcolocate.trl.use_sglang():
        trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True, ...))
    trainer.train()

Nothing else in the script changes, and vLLM need not be installed.  See `use_sglang`.
"""

from tpcolocate.trl.engines import Engines, use_sglang

__all__ = ["Engines", "use_sglang"]

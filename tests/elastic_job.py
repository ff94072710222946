"""A job that torchrun starts again each time that it has lost a rank; run by test_elastic.py.

    torchrun --max-restarts 2 --nproc-per-node 2 elastic_job.py MODEL FOLDER RANK RANK

loses one of these ranks in its first life, and the other one in its second.

Writes FOLDER/life-rank.json: the server's processes, the version, and what was generated.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import AutoModelForCausalLM

import tpcolocate
from tpcolocate.runtime_folder import private_folders, read_owner, read_processes

SERVER = {"skip_tokenizer_init": True, "context_length": 128, "max_total_tokens": 1024, "max_running_requests": 4}


def of_this_job(owner_pid):
    """Processes and folders of the launches of one owner."""
    found = {}
    for folder in private_folders():
        owner = read_owner(folder)
        if owner is not None and owner.pid == owner_pid:
            found[str(folder)] = {"temporary": owner.temporary, "processes": read_processes(folder / "processes.json")}
    return found


def main():
    model_path, folder, doomed = sys.argv[1], Path(sys.argv[2]), [int(rank) for rank in sys.argv[3:]]
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with tpcolocate.init(2, device="cpu", timeout_s=120.0, job="elastic-test") as colo:
        with colo.launch(model_path, load_format="dummy", health_timeout_s=240.0, **SERVER) as engine:
            report = engine.sync_weights(model)
            [answer] = engine.generate([[3, 1, 4, 1, 5]], {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True})
            owners = [None, None]
            dist.all_gather_object(owners, os.getpid() if colo.is_owner else None)
            owner_pid = next(pid for pid in owners if pid is not None)
            found = {
                "pid": os.getpid(), "version": report.weight_version, "tokens": answer["output_ids"],
                "launches": of_this_job(owner_pid),
            }  # fmt: skip
            (folder / f"{life}-{rank}.json").write_text(json.dumps(found))
            dist.barrier()
            if life < len(doomed):
                if rank == doomed[life]:
                    os.kill(os.getpid(), signal.SIGKILL)
                engine.generate([[1, 2, 3]], {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True})
                dist.barrier()  # until torchrun ends this rank
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Checks of requests beside collective calls, each run on every rank of a set-up of test_engine_calls.

What a rank's own threads, its other ranks and other processes may ask for while the slice pauses, syncs and sleeps.
"""

import contextlib
import copy
import random
import threading
import time

import torch
from test_engine import GREEDY, PROMPTS

import tpcolocate
from tpcolocate import errors
from tpcolocate.server.lifecycle import PAUSES

# Of half a minute of work at least, so that on a busy machine too it is not over before it is aborted.
LONG = {"temperature": 0, "max_new_tokens": 16000, "ignore_eos": True}
# What a server needs to run one of each rank, and another after it.
LONG_ARGS = {"context_length": 16384, "max_total_tokens": 80000}


def outcome_of(call):
    """The class and message of what `call` raises, the same on all ranks; or what it returned."""
    try:
        return repr(call())
    except errors.TpColocateError as error:
        return type(error).__name__, error.message


def choices(model, ids, past=None):
    """What `model` would choose after each of `ids`."""
    with torch.no_grad():
        return model(torch.tensor([ids]), past_key_values=past).logits[0].argmax(-1).tolist()


def follows(model, prompt, tokens):
    """Whether all of `tokens` are what `model` would have chosen, greedily."""
    return choices(model, [*prompt, *tokens[:-1]])[len(prompt) - 1 :] == tokens


def generates_as(world, model, name=None):
    """Whether the engine, with an adapter or without, generates with the weights of `model`."""
    fields = {} if name is None else {"lora_path": name}
    answers = world.engine.generate(PROMPTS, GREEDY, **fields)
    return all(follows(model, prompt, answer["output_ids"]) for prompt, answer in zip(PROMPTS, answers))


class InFlight(threading.Thread):
    """One long request of this rank, streamed."""

    def __init__(self, world):
        super().__init__(daemon=True)
        world.num_requests = getattr(world, "num_requests", 0) + 1
        self.world, self.rid = world, f"rank-{world.rank}-{world.num_requests}."  # no prefix of another
        self.prompt = PROMPTS[world.rank]
        self.tokens, self.finish, self.error = [], None, None
        self.news = threading.Condition()

    def run(self):
        try:
            events = self.world.engine.generate([self.prompt], LONG, stream=True, timeout_s=60, rid=[self.rid])
            for event in events:
                with self.news:
                    self.tokens, self.finish = event["output_ids"], event["meta_info"]["finish_reason"]
                    self.news.notify_all()
        except BaseException as error:
            self.error = error

    def grow(self, count):
        """Wait for so many more tokens, of which there must be some left."""
        with self.news:
            enough = len(self.tokens) + count
            assert self.news.wait_for(lambda: len(self.tokens) >= enough or self.finish or self.error, 60)
            assert self.finish is None and self.error is None, (self.finish, self.error)

    def end(self):
        self.world.engine.abort_request(self.rid)
        self.join(60)
        assert not self.is_alive() and self.error is None, self.error
        return self.tokens


def in_flight(world):
    """A long request per rank, all of them running."""
    request = InFlight(world)
    request.start()
    request.grow(8)
    world.colo._slice.all_gather(None, what="see all requests run")
    return request


def handed_over(old, new, prompt, tokens, *, old_cache):
    """The number of tokens that `old` chose before `new` went on; None if there is no such number.

    Args:
        old_cache: Whether `new` goes on with the keys and values of `old`, or computes its own.
    """
    from transformers import DynamicCache

    first = len(prompt) - 1
    of_old = choices(old, [*prompt, *tokens[:-1]])[first:]
    of_new = choices(new, [*prompt, *tokens[:-1]])[first:]
    for k in range(1, len(tokens)):
        if of_old[k - 1] != tokens[k - 1]:
            return None
        if old_cache:
            past = DynamicCache()
            choices(old, [*prompt, *tokens[: k - 1]], past)
            rest = choices(new, tokens[k - 1 : -1], past)
        else:
            rest = of_new[k:]
        if rest == tokens[k:]:
            return k
    return None


def sync_under_requests(world):
    """Without a pause of the user's: retracted, kept, and gone on with the new weights."""
    old = copy.deepcopy(world.model)
    world.perturb(20)
    request = in_flight(world)
    world.engine.sync_weights(world.model)
    request.grow(16)
    k = handed_over(old, world.model, request.prompt, request.end(), old_cache=False)
    return {"handed over": k is not None and k >= 8, "equal": generates_as(world, world.model)}


def request_begun_during_a_sync(world):
    """By another thread of every rank, while the weights are half old, half new."""
    engine, answers, health = world.engine, [], []
    world.perturb(28)

    def ask():
        try:
            [answer] = engine.generate([PROMPTS[world.rank]], {"temperature": 0, "max_new_tokens": 24})
            answers.append(answer["output_ids"])
        except Exception as error:
            answers.append(error)

    asking = threading.Thread(target=ask, daemon=True)

    def weights():
        for number, item in enumerate(world.model.named_parameters()):
            if number == 8:
                asking.start()
                while not engine._context.client.num_in_flight and not answers:
                    time.sleep(0.001)
                health.append(engine.health().value)
            yield item

    engine.sync_weights(weights(), bucket_bytes=100_000)
    asking.join(60)
    [tokens] = answers
    if isinstance(tokens, Exception):
        raise tokens
    of_new = follows(world.model, PROMPTS[world.rank], tokens)
    return {"of new": of_new, "health": health, "equal": generates_as(world, world.model)}


def crossed_calls(world):
    """Ranks that do not make the same call, or not with the same arguments."""
    engine, rank = world.engine, world.rank
    model = copy.deepcopy(world.model)
    world.perturb(29)
    found = {}
    if world.colo.tp_size > 1:
        found = {
            "call": outcome_of(engine.pause_generation if rank == 0 else lambda: engine.sync_weights(world.model)),
            "mode": outcome_of(lambda: engine.pause_generation(["retract", "abort"][rank])),
            "tags": outcome_of(lambda: engine.sleep([["weights", "kv_cache"], ["kv_cache"]][rank])),
            "bucket_bytes": outcome_of(lambda: engine.sync_weights(world.model, bucket_bytes=400_000 + rank)),
            "weight_version": outcome_of(lambda: engine.sync_weights(world.model, weight_version=f"of rank {rank}")),
        }
    unchanged = generates_as(world, model)
    engine.sync_weights(world.model)
    return {
        "outcomes": found,
        "unchanged": unchanged,
        "version": engine.weight_version,
        "equal": generates_as(world, world.model),
    }


def sync_before_the_last_rank_has_its_tokens(world):
    """Rank 0 comes to the sync at once, the last one when its rollout is over; in a sync like the one before, and in another."""
    found = []
    world.engine.sync_weights(world.model)
    for number, options in enumerate([{}, {"bucket_bytes": 400_000}]):
        old = copy.deepcopy(world.model)
        world.perturb(30 + number)
        world.colo._slice.all_gather(None, what="begin together")
        prompt, tokens = PROMPTS[world.rank], []
        if world.rank == world.colo.tp_size - 1:
            [answer] = world.engine.generate(
                [prompt], {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}, timeout_s=60
            )
            tokens = answer["output_ids"]
        report = world.engine.sync_weights(world.model, timeout_s=120, **options)
        found.append({
            "of old": not tokens or (len(tokens) == 64 and follows(old, prompt, tokens)),
            "in time": report.seconds < 100,
            "equal": generates_as(world, world.model),
        })  # fmt: skip
    return found


@contextlib.contextmanager
def rollouts(world, *clients, most_tokens, rest_s, refused=(), go=None):
    """A thread for each client generates until the body is over; yields the messages of errors that are `refused`.

    Args:
        go: An event; while it is not set, the first client makes no new requests.
    """
    over, problems, messages = threading.Event(), [], []

    def roll_out(client, chance):
        while not over.is_set() and not problems:
            if go is not None and client is clients[0] and not go.wait(0.1):
                continue
            prompts = [[chance.randrange(1, 400) for _ in range(chance.randrange(1, 12))] for _ in range(2)]
            params = {"temperature": 1.0, "max_new_tokens": chance.randrange(1, most_tokens)}
            try:
                client.generate(prompts, params, timeout_s=60)
                time.sleep(chance.random() * rest_s)
            except refused as error:
                messages.append(error.message)
                time.sleep(0.002)
            except Exception as error:
                problems.append(error)

    threads = [
        threading.Thread(target=roll_out, args=(client, random.Random(f"{world.rank} {number}")), daemon=True)
        for number, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    yield messages
    over.set()
    for thread in threads:
        thread.join(60)
    if problems:
        raise problems[0]
    assert not any(thread.is_alive() for thread in threads)
    world.colo._slice.all_gather(None, what="see all rollouts end")


def rollouts_beside_everything(world):
    """The ranks come to each collective call when they come."""
    engine, together, alone = world.engine, random.Random(0), random.Random(world.rank)
    with rollouts(world, engine, engine, most_tokens=20, rest_s=0.3):
        for number in range(8):
            engine.generate([PROMPTS[world.rank]], {**GREEDY, "max_new_tokens": alone.randrange(1, 30)})
            time.sleep(alone.choice([0, 0.02, 0.1]))
            mode = together.choice([None, None, "retract", "abort"])
            world.perturb(100 + number, scale=0.02)
            if mode is not None:
                engine.pause_generation(mode)
            source = world.sharded() if world.colo.tp_size > 1 and together.random() < 0.3 else world.model
            try:
                engine.sync_weights(source, parts=together.random() < 0.8, timeout_s=60)
            finally:
                if mode is not None:  # or all checks after this one would wait
                    engine.continue_generation()
    return generates_as(world, world.model)


def sleep_beside_rollouts(world):
    """A sleep either finds a request of the slice's or is found by it; those of others are done before it, or wait."""
    engine, slept, refused, of_stream = world.engine, 0, 0, None
    go, ends = threading.Event(), time.monotonic() + 240
    with (
        contextlib.closing(tpcolocate.connect(world.colo.job, slice_index=0)) as other,
        rollouts(world, engine, other, most_tokens=3, rest_s=0.4, refused=errors.EngineStateError, go=go) as messages,
    ):
        while min(slept, refused) < 10:  # the same on every rank
            # Both come up, however fast the machine is: requests that are under way end once no more are made.
            if refused > slept:
                go.clear()
            else:
                go.set()
            late = world.colo._slice.all_gather(time.monotonic() > ends, what="compare the time")
            assert not any(late), f"slept {slept} times, refused {refused} times"
            outcome = outcome_of(engine.sleep)
            if outcome == "None":
                slept += 1
                go.set()
                num_before = len(messages)
                while len(messages) == num_before and time.monotonic() < ends:
                    time.sleep(0.001)
                # As one that was asked for before and is read now.
                stream = engine._context.client._stream({"input_ids": [1]}, timeout_s=60)
                of_stream = outcome_of(lambda stream=stream: next(stream))
                engine.wake()
            else:
                refused += 1
                assert outcome[0] == "EngineStateError" and "are in flight" in outcome[1], outcome
            time.sleep(0.01)
    return {
        "often": min(slept, refused),
        "refused": sorted(set(messages)),
        "stream": of_stream,
        "equal": generates_as(world, world.model),
    }


def another_process_asks_while_the_engine_sleeps(world):
    """It does not know; its request waits until all is awake, and gets the weights of then."""
    engine, answers = world.engine, []
    world.perturb(27)
    engine.sleep()
    with contextlib.closing(tpcolocate.connect(world.colo.job, slice_index=0)) as other:
        request = {"temperature": 0, "max_new_tokens": 24}
        prompt = PROMPTS[world.rank]
        asking = threading.Thread(target=lambda: answers.append(other.generate([prompt], request)), daemon=True)
        asking.start()
        waited = []
        for step in (lambda: None, lambda: engine.wake(["weights"]), lambda: engine.sync_weights(world.model)):
            step()
            asking.join(0.5)  # there is nothing to wait for: it must not come
            waited.append(not answers)
        engine.wake()
        asking.join(60)
    [[answer]] = answers
    of_new = follows(world.model, prompt, answer["output_ids"])
    return {"waited": waited, "of new": of_new, "equal": generates_as(world, world.model)}


def flush_once_idle(engine):
    """Drop the cache; a request whose answer has come may stay in the scheduler for a moment."""
    ends = time.monotonic() + 60
    while (outcome := outcome_of(engine.flush_cache)) != "None":
        assert outcome[0] == "EngineStateError" and time.monotonic() < ends, outcome
        time.sleep(0.05)


def differ_soon(old, new, prompt, most=8):
    """Whether `new`, from any token of `old` on, soon chooses another token."""
    tokens = list(prompt)
    for _ in range(100):
        tokens.append(choices(old, tokens)[-1])
    alike = 0
    for of_old, of_new in zip(tokens[len(prompt) :], choices(new, tokens[:-1])[len(prompt) - 1 :], strict=True):
        alike = alike + 1 if of_old == of_new else 0
        if alike > most:
            return False
    return True


def perturbed_until_tokens_differ(world, seed):
    """Perturb the model; return what it was, which the engine has.  A model that only repeats itself may choose the same tokens as before."""
    for attempt in range(30):
        old = copy.deepcopy(world.model)
        world.perturb(seed + 1000 * attempt)
        if all(differ_soon(old, world.model, prompt) for prompt in PROMPTS[: world.colo.tp_size]):
            return old
        world.engine.sync_weights(world.model)
    raise AssertionError("no two models whose tokens differ")


def sync_under_a_pause(world):
    """In each mode of the user's: what became of the requests, and that the pause stays."""
    engine, found = world.engine, {}
    for number, mode in enumerate(PAUSES):
        old = perturbed_until_tokens_differ(world, 21 + number)
        request = in_flight(world)
        engine.pause_generation(mode)
        engine.pause_generation(mode)  # nothing more
        other = outcome_of(lambda mode=mode: engine.pause_generation("abort" if mode == "retract" else "retract"))
        health = engine.health().value
        report = engine.sync_weights(world.model)
        later = InFlight(world)
        later.start()
        time.sleep(0.3)  # there is nothing to wait for: it must not come
        held = not later.tokens and (mode == "abort" or request.finish is None)
        ended = request.finish and request.finish["type"]
        engine.continue_generation()
        engine.continue_generation()
        if mode != "abort":
            request.grow(16)
        later.grow(8)
        tokens, of_later = request.end(), later.end()
        world.colo._slice.all_gather(None, what="see all requests end")
        if mode == "in_place":
            flush_once_idle(engine)
        found[mode] = {
            "other": other,
            "health": health,
            "held": held,
            "ended": ended,
            "of old": follows(old, request.prompt, tokens),
            "handed over": handed_over(old, world.model, request.prompt, tokens, old_cache=False),
            "handed over with its cache": handed_over(old, world.model, request.prompt, tokens, old_cache=True),
            "later of new": follows(world.model, later.prompt, of_later),
            "warned": [warning for warning in report.warnings if "cache of the old weights" in warning],
            "equal": generates_as(world, world.model),
        }
    return found


def abort_and_flush(world):
    engine = world.engine
    request = in_flight(world)
    refused = outcome_of(engine.flush_cache)
    if world.rank == 0:
        request.end()
    world.colo._slice.all_gather(None, what="see the first one end")
    if world.rank > 0:
        request.grow(4)  # its end was not asked for
    world.colo._slice.all_gather(None, what="see the others go on")
    if world.rank == 0:
        engine.abort_request()  # those of other ranks too
    request.join(60)
    world.colo._slice.all_gather(None, what="see all requests end")
    flush_once_idle(engine)
    world.colo._slice.all_gather(None, what="see the cache go")
    cached = 0
    if world.rank == 0:
        [answer] = engine.generate([request.prompt], GREEDY)
        cached = answer["meta_info"]["cached_tokens"]
    return {
        "refused": refused,
        "ended": request.finish["type"],
        "cached": cached,
        "empty": outcome_of(lambda: engine.abort_request("")),
        "mode": outcome_of(lambda: engine.pause_generation("stop")),
    }

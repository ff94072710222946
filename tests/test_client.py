"""A client of `generate` against a server that answers at once: what it asks for, keeps, and returns."""

import asyncio
import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_http import Handler, Server

import tpcolocate
from tpcolocate import launch, rendezvous
from tpcolocate.engine.client import Client
from tpcolocate.errors import ConfigError, DeadlineError, EngineStateError, RequestError

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

INFO = {"version": "0.5.21", "context_length": 64, "max_req_input_len": 60, "enable_lora": None}
REFUSED = "9" * 10


class Generator(Handler):
    """Answers with what it was asked for; refuses a prompt of 9s, as a server does whose tokenizer counts too many."""

    def handle_any(self):
        path = self.path
        self.server.over.wait(self.server.delay_s)
        if self.command == "GET":
            self.server.requests.append(("GET", path))
            answers = {
                "/server_info": {**INFO, "model_path": self.server.model_path},
                "/model_info": {"has_image_understanding": False, "has_audio_understanding": False},
                "/openapi.json": {"components": {"schemas": {"GenerateReqInput": {"properties": {"new_field": {}}}}}},
            }
            return self.answer(200, json.dumps(answers[path]).encode())
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(("POST", body))
        if REFUSED in body.get("text", ()):
            return self.answer(400, b'{"error": {"message": "too long"}}')
        if body.get("stream"):
            return self.events([b"data: " + json.dumps(body).encode() + b"\n\n", b"data: [DONE]\n\n"])
        samples = (body.get("sampling_params") or {}).get("n", 1)
        prompts = body.get("text", body.get("input_ids"))
        is_list = isinstance(prompts, list) and not isinstance(prompts[0], int)
        answers = [{"of": prompt} for prompt in (prompts if is_list else [prompts]) for _ in range(samples)]
        return self.answer(200, json.dumps(answers if is_list or samples > 1 else answers[0]).encode())

    do_GET = do_POST = handle_any


@pytest.fixture
def server(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    with Server(("127.0.0.1", 0), Generator) as server:
        server.model_path, server.delay_s = str(tmp_path), 0.0
        yield server


@pytest.fixture
def client(server):
    client = Client(server.url)
    yield client
    client.close()


def asked(server, kind="POST"):
    return [what for each, what in server.requests if each == kind]


ENTRIES = {
    "blocking": lambda client, *args, **options: client.generate(*args, **options),
    "asyncio": lambda client, *args, **options: asyncio.run(client.generate_async(*args, **options)),
    "inside a loop": lambda client, *args, **options: asyncio.run(inside(client, *args, **options)),
}
every_entry = pytest.mark.parametrize("generate", ENTRIES.values(), ids=ENTRIES)


async def inside(client, *args, **options):
    return client.generate(*args, **options)  # as in a notebook


@every_entry
def test_limits_are_asked_for_once(server, client, generate):
    for _ in range(3):
        assert generate(client, torch.tensor([1, 2])) == {"of": [1, 2]}
        with pytest.raises(ConfigError, match="token 0 of the prompt is 100, outside of the vocabulary of 100"):
            generate(client, [100])
        with pytest.raises(ConfigError, match="fewer than 60"):
            generate(client, [1] * 60)
    assert asked(server, "GET") == ["/server_info", "/model_info"]
    assert generate(client, [1], new_field=5) and generate(client, [1], new_field=6)
    with pytest.raises(ConfigError, match="has no field other_field"):
        generate(client, [1], other_field=5)
    assert asked(server, "GET") == ["/server_info", "/model_info", "/openapi.json"]


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_client_is_a_context_manager_that_closes_it(server, error):
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        with Client(server.url) as client:
            assert client.generate([[1]]) is not None
            if error is not None:
                raise error
    assert client.http._closed


@every_entry
def test_the_first_call_asks_what_the_server_is_within_its_own_time(server, client, generate):
    server.delay_s = 0.7  # each request for itself is in time
    with pytest.raises(DeadlineError, match="no answer within 1 s"):
        generate(client, "a", new_field=5, timeout_s=1.0)
    assert len(asked(server, "GET")) <= 2 and asked(server) == [], "four requests take 2.8 s"
    server.delay_s = 0.0
    assert generate(client, "a", new_field=5, timeout_s=10.0) == {"of": "a"}


def test_a_process_with_another_cache_of_the_hub_has_the_limits_of_the_model_that_the_owner_found(
    server, monkeypatch, tmp_path
):
    folder, server.model_path = server.model_path, "organisation/not-here"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 100, "content": "[PAD]"}]}))
    group = SimpleNamespace(ranks=(0,), rank=0, timeout_s=5.0)
    tp_slice = launch.TpSlice(group, 0, torch.device("cpu"), (), False, "job", 0)
    request = launch.LaunchRequest(server.model_path, {}, {}, "1-ab", health_timeout_s=5.0)
    monkeypatch.setattr(launch, "local_folder", lambda path: Path(folder), raising=False)
    announcement = launch.Launch(tp_slice, request)._announcement(SimpleNamespace(url=server.url, api_key="key"))
    read = rendezvous.parse(json.dumps(asdict(announcement)))
    monkeypatch.setattr(rendezvous, "discover", lambda: [(tmp_path / "announcement.json", read)])
    with contextlib.closing(tpcolocate.connect("job")) as client:
        with pytest.raises(ConfigError, match="outside of the vocabulary of 100"):
            client.generate([100])
        with pytest.raises(ConfigError, match="PAD"):
            client.generate("a [PAD]")
        assert client.generate([99]) == {"of": [99]}


@every_entry
def test_no_prompts_are_no_request(server, client, generate):
    assert generate(client, []) == [] and asked(server) == []
    assert list(client.generate([], stream=True)) == []


@every_entry
def test_bad_prompts_are_errors_in_their_place(server, client, generate):
    answers = generate(client, ["a", "", REFUSED, "b"], {"temperature": 0}, on_error="return")
    assert [answers[0], answers[3]] == [{"of": "a"}, {"of": "b"}]
    assert isinstance(answers[1], ConfigError) and "prompt 1 is empty" in str(answers[1])
    assert isinstance(answers[2], RequestError) and "too long" in str(answers[2]) and answers[2].status == 400
    assert sorted(body["text"] for body in asked(server)) == sorted(["a", "b", REFUSED]), "each once"


@every_entry
def test_several_samples_of_a_bad_prompt_keep_the_places_of_the_others(client, generate):
    answers = generate(client, [[1], [-1], [2]], {"n": 2}, on_error="return")
    assert [answer if isinstance(answer, dict) else type(answer) for answer in answers] == [
        {"of": [1]}, {"of": [1]}, ConfigError, ConfigError, {"of": [2]}, {"of": [2]},
    ]  # fmt: skip


@every_entry
def test_a_single_bad_prompt_is_returned_and_a_bad_call_raised(client, generate):
    assert generate(client, "a", on_error="return") == {"of": "a"}
    assert isinstance(generate(client, "", on_error="return"), ConfigError)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate(client, ["a"], {"max_tokens": 5}, on_error="return")


@every_entry
@pytest.mark.parametrize("options, words", [
    ({"on_error": "ignore"}, "on_error is 'ignore'"),
    ({"on_error": torch.ones(2)}, "on_error is tensor"),
    ({"on_error": "return", "stream": True}, "with stream=True"),
    ({"timeout_s": 0}, "timeout_s must be a positive number of seconds, got 0"),
    ({"timeout_s": float("inf")}, "timeout_s must be"),
    ({"timeout_s": "5"}, "timeout_s must be"),
    ({"stream": 1}, "stream must be True or False"),
])  # fmt: skip
def test_options_are_checked(server, client, generate, options, words):
    with pytest.raises(ConfigError, match=words):
        generate(client, "a", **options)
    assert asked(server) == []


def test_bad_prompts_of_streams_are_refused_at_once(server, client):
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        client.generate(["a", ""], stream=True)

    async def of_async():
        return await client.generate_async(["a", ""], stream=True)

    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        asyncio.run(of_async())
    assert asked(server) == []
    assert [event["text"] for event in client.generate("a", stream=True)] == ["a"]


def test_requests_are_counted_while_they_run_and_checked_first(server):
    def check():
        raise EngineStateError("asleep")

    client = Client(server.url, check=check)
    for generate in ENTRIES.values():
        with pytest.raises(EngineStateError):
            generate(client, "a", on_error="return")
    assert server.requests == [] and client.num_in_flight == 0
    client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_dropped_with_its_event_loop_is_not_in_flight(client, stream):
    """As with Ctrl-C in a loop that is closed after that: no sleep would be possible any more."""

    async def ask():
        answer = await client.generate_async("a", stream=stream)
        if stream:
            await anext(answer)
            await asyncio.sleep(60)

    async def leave():
        asking = asyncio.ensure_future(ask())
        while not client.num_in_flight:
            await asyncio.sleep(0)
        return asking

    client.generate("a")  # asks for the limits
    loop = asyncio.new_event_loop()
    asking = loop.run_until_complete(leave())
    assert client.num_in_flight == 1 and not asking.done()
    loop.close()
    assert client.num_in_flight == 0
    client.generate("a")
    assert client.num_in_flight == 0


@pytest.mark.parametrize(
    "url", [None, "", "127.0.0.1:3000", "https://host:1", "http://", "http://host:1/v1", "http://[x:1"]
)
def test_what_is_no_address_of_a_server_is_refused(url):
    with pytest.raises(ConfigError, match="url"):
        Client(url, api_key="key")
    with pytest.raises(ConfigError, match="api_key must be a string"):
        Client("http://127.0.0.1:1", api_key=1)

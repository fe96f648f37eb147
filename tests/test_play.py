"""aymen-gpt play: OpenAI's API with real clients, the line of requests, what it refuses, the page in a browser."""

import http.client
import json
import re
import shutil
import socket
import threading
import time
import urllib.request
from contextlib import contextmanager
from urllib.error import HTTPError

import pytest
import torch
from conftest import make_shards

from aymen_gpt.__main__ import command
from aymen_gpt.commands import play
from aymen_gpt.data import tokenizer
from aymen_gpt.errors import CannotWrite, DataError, UsageError
from aymen_gpt.model.generation import generate

uvicorn = pytest.importorskip("uvicorn", reason="play needs the extra [play]")
pytest.importorskip("fastapi", reason="play needs the extra [play]")
from aymen_gpt.play import models, server  # noqa: E402

pytestmark = pytest.mark.slow
NAME = "little <i>run"  # of the run: the page must show it as it is


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of three steps."""
    folder = tmp_path_factory.mktemp("play")
    words = ["--preset", "tiny", "--data", make_shards(folder / "shards"), "--run-dir", folder / NAME]
    words += ["--steps", 6, "--checkpoint-every", 3, "--keep-last", 2, "--keep-also", 1, "--device", "cpu"]
    command("pretrain", list(map(str, words)))
    return folder / NAME


@contextmanager
def serving(served):
    with play.listen("127.0.0.1", 0) as listening:
        app = server.app(served, hosts=["127.0.0.1"], curves=lambda: play.curves(served.run))
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            running.should_exit = running.force_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def served(run):
    return models.Models(str(run), torch.device("cpu"))


@pytest.fixture(scope="module")
def port(served):
    with serving(served) as port:
        yield port


def ask(port, path="/v1/completions", headers={}, **body):  # noqa: B006
    data = json.dumps({"model": NAME} | body).encode() if body else None
    return urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers))


def test_completions_are_what_generate_writes_and_openais_client_reads_them(served, port):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME, *(f"{NAME}:{step}" for step in (1, 3, 6))]
    options = {"model": NAME, "prompt": "The function", "max_tokens": 20, "temperature": 0.9, "seed": 7}
    whole = client.completions.create(**options, n=2, logprobs=3)
    ids = tokenizer.encode("The function").tolist()
    for choice, seed in zip(whole.choices, (7, 8), strict=True):
        expected = list(generate(served.load(NAME), ids, 20, temperature=0.9, seed=seed, stop=tokenizer.EOT))
        assert choice.text == tokenizer.gpt2().decode(expected)
        assert choice.logprobs.token_ids == expected
        assert [len(top) for top in choice.logprobs.top_logprobs] == [3] * len(expected)
    assert (whole.usage.prompt_tokens, whole.usage.total_tokens) == (2, 42)
    streamed = list(client.completions.create(**options, stream=True))
    assert "".join(part.choices[0].text for part in streamed) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in streamed if part.choices[0].finish_reason] == ["length"]
    earlier = client.completions.create(**options | {"model": f"{NAME}:1"}, logprobs=3)
    assert earlier.choices[0].logprobs.token_logprobs[0] != whole.choices[0].logprobs.token_logprobs[0]
    with pytest.raises(openai.BadRequestError, match="the prompt has 65 tokens, the model reads 64"):
        client.completions.create(**options | {"prompt": [1] * 65})
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt5'"):
        client.completions.create(**options | {"model": "gpt5"}, stream=True)


def test_echo_tells_what_the_model_made_of_the_prompt(served, port):
    text = "One list, two lists."
    answer = json.load(ask(port, prompt=text, echo=True, logprobs=1, max_tokens=0))["choices"][0]
    ids = tokenizer.encode(text).tolist()
    with torch.inference_mode():
        logits = served.load(NAME)(torch.tensor([ids]))[0].log_softmax(-1)
    assert (answer["text"], answer["finish_reason"]) == (text, "length")
    assert answer["logprobs"]["text_offset"] == [text.index(word) for word in answer["logprobs"]["tokens"]]
    assert answer["logprobs"]["token_logprobs"][0] is None
    nothing = json.load(ask(port, prompt=text, max_tokens=0))["choices"]
    assert [(choice["text"], choice["finish_reason"]) for choice in nothing] == [("", "length")]
    expected = [float(logits[i, id]) for i, id in enumerate(ids[1:])]
    assert answer["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(port):
    options = {"prompt": "a", "seed": 3, "max_tokens": 40}
    whole = json.load(ask(port, **options))["choices"][0]["text"]
    for word in (whole[5:9], whole[-3:], whole[10:11]):
        for stream in (False, True):
            answer = ask(port, **options, stop=["never said", word], stream=stream).read().decode()
            found = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
            choices = [part["choices"][0] for part in found or [json.loads(answer)]]
            assert "".join(choice["text"] for choice in choices) == whole[: whole.index(word)]
            assert choices[-1]["finish_reason"] == "stop"


def test_lm_evals_local_completions_choose_as_our_scorer_does(run, served, port, real, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    from aymen_gpt.evaluation import hellaswag
    from aymen_gpt.evaluation.lm_eval_bridge import offline_hellaswag

    short = [example for example in real if len(example.ctx + max(example.endings, key=len)) < 160][:20]
    options = {
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "model": NAME,
        "tokenizer": str(sorted((run / "checkpoints").iterdir())[-1]),
        "tokenizer_backend": "huggingface",
        "max_length": 64,
    }
    tasks = offline_hellaswag(tmp_path / "tasks", short)
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=options,
        tasks=["offline_hellaswag"],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["offline_hellaswag"], key=lambda sample: sample["doc_id"])
    theirs = torch.tensor([[response[0] for response in sample["filtered_resps"]] for sample in samples])
    ours = hellaswag.evaluate(served.load(NAME), short, protocols=("harness",)).answers["harness"]
    assert theirs.argmax(1).tolist() == [answer.choice for answer in ours]
    assert torch.allclose(theirs, torch.tensor([answer.log_likelihoods for answer in ours]), atol=1e-3)


def test_attention_and_losses_of_a_text(served, port):
    found = json.load(ask(port, "/api/inspect", text="a list of lists", layer=1, head=1))
    ids = found["logprobs"]["token_ids"]
    assert ids == [50256, *tokenizer.encode("a list of lists").tolist()]
    rows = torch.tensor(found["attention"])
    assert torch.allclose(rows.sum(1), torch.ones(len(ids)), atol=0.01)
    assert (rows.triu(1) == 0).all()
    # What comes out of the model's own attention is the mean of the values, weighted with these.
    model, block = served.load(NAME), served.load(NAME).h[1]
    weights = torch.tensor(models.attention(model, ids, 1, 1))
    seen = {}
    handle = block.attn.c_proj.register_forward_hook(lambda module, args, out: seen.update(x=args[0]))
    inner = block.attn.c_attn.register_forward_hook(lambda module, args, out: seen.update(qkv=out))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    handle.remove()
    inner.remove()
    values = seen["qkv"][0, :, 64 + 16 :]  # of the second of two heads, each 16 wide
    assert torch.allclose(weights @ values, seen["x"][0, :, 16:], atol=1e-5)


@pytest.mark.fault(60)
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "Invalid JSON"),
        (b'{"model": "NAME", "prompt": [50257]}', 400, "each 0 to 50256"),
        (b'{"model": "NAME", "prompt": []}', 400, "0 prompts x n = 1: 1 to 64 answers"),
        (b'{"model": "NAME", "n": 40, "prompt": ["a", "b"]}', 400, "2 prompts x n = 40"),
        (
            b'{"model": "NAME", "max_tokens": 5000}',
            400,
            "max_tokens: Input should be less than or equal to 4096",
        ),
        (b'{"model": "NAME", "temperature": -1}', 400, "temperature: "),
        (b'{"model": "../../etc", "prompt": "a"}', 404, "there is no model '../../etc'"),
        (b'{"model": "NAME:2", "prompt": "a"}', 404, "there is no model 'NAME:2'"),
        (b'{"prompt": "' + b"a" * 2**20 + b'"}', 413, "a request may have 1,048,576 bytes"),
        (b'{"model": "NAME", "prompt": "' + b"ab " * 300_000 + b'"}', 400, "the model reads 64"),
    ],
)
def test_a_bad_request_is_one_line(port, body, status, message):
    body, message = body.replace(b"NAME", NAME.encode()), message.replace("NAME", NAME)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", body)
    response = connection.getresponse()
    error = json.load(response)["error"]["message"]
    assert (response.status, message in error, "\n" in error) == (status, True, False), error


@pytest.mark.fault(59)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),  # DNS rebinding
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403),  # another port
    ],
)
def test_only_its_own_page_may_ask_and_no_header_invites_others(port, headers, status):
    with pytest.raises(HTTPError) as caught:
        ask(port, headers=headers, prompt="a", max_tokens=1)
    assert caught.value.code == status
    answer = ask(port, "/", {"Origin": f"http://127.0.0.1:{port}"})
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


@pytest.mark.fault(59)
def test_play_listens_on_this_machine_alone_unless_it_is_told_otherwise(monkeypatch, run, capsys):
    bound = []

    def listen(host, port):
        bound.append(host)
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(play, "listen", listen)
    for words in ([], ["--host", "0.0.0.0"]):
        with pytest.raises(
            CannotWrite, match="cannot listen at .*:8000: Address already in use; try another --port"
        ):
            command("play", ["-m", str(run), *words])
    assert bound == ["127.0.0.1", "0.0.0.0"]
    assert capsys.readouterr().err.startswith("warning: anybody who can reach 0.0.0.0 may use this model")


def test_without_its_packages_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(UsageError, match=r"play needs uvicorn: type pip install 'aymen-gpt\[play\]'"):
        command("play", ["-m", "runs/none"])


def raw(port, **body):
    """A connection on which a streamed answer has begun."""
    content = json.dumps(
        {"model": NAME, "prompt": "a", "stream": True, "max_tokens": 4096, "temperature": 1} | body
    )
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall((head + content).encode())
    return connection


def read_until(connection, words):
    connection.settimeout(20)
    content = b""
    while words not in content:
        part = connection.recv(10_000)
        assert part
        content += part


def waiting(port):
    return sum(json.load(ask(port, "/api/state"))["waiting"].values())


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.fault(60)
def test_a_client_that_goes_away_stops_its_text_and_leaves_the_line(run, monkeypatch):
    monkeypatch.setattr(server, "MOST_WAITING", 3)
    served = models.Models(str(run), torch.device("cpu"))
    real = models.draw
    closed = []

    def endless(*args, **more):
        try:
            for _ in range(10**6):
                time.sleep(0.01)
                yield from real(args[0], args[1], 1, temperature=0)
        finally:
            closed.append(True)

    monkeypatch.setattr(models, "draw", endless)
    with serving(served) as port:
        clients = []
        for place in (1, 2, 3):
            clients.append(raw(port))
            until(lambda place=place: waiting(port) == place)
        with pytest.raises(HTTPError, match="503"):
            ask(port, prompt="a")
        read_until(clients[2], b"2 before this request")
        clients[1].close()  # in the line
        until(lambda: waiting(port) == 2)
        clients[0].close()  # while its text is made
        until(lambda: waiting(port) == 1 and len(closed) == 1)
        read_until(clients[2], b"data: {")
        clients[2].close()
        until(lambda: waiting(port) == 0 and len(closed) == 2)
        other = f"{NAME}:3"
        answer = [raw(port, model=name) for name in (NAME, other)]  # two models take turns
        for client in answer:
            read_until(client, b"data: {")
            client.close()
        until(lambda: waiting(port) == 0)


def test_few_models_stay_in_memory_and_a_training_is_followed(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    newest = copy / "checkpoints/step-000000006"
    newest.rename(tmp_path / "later")
    served = models.Models(str(copy), torch.device("cpu"))
    before = models.read(served.load("copy"), [1, 2], 0)
    (tmp_path / "later").rename(newest)
    assert models.read(served.load("copy"), [1, 2], 0) != before
    assert served.load("copy") is served.load("copy:6")
    for step in (1, 3, 6):
        served.load(f"copy:{step}")
    assert len(served._loaded) == 3
    (newest / "model.safetensors").write_bytes(b"")
    served._loaded.clear()
    with pytest.raises(DataError, match="step-000000006 is damaged"):
        served.load("copy:6")
    assert served.load("copy") is served.load("copy:3")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if not path:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_writes_tells_probabilities_travels_and_stops(browser, port, width, scheme):
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"http://127.0.0.1:{port}/")
    hostile = "<img src=x onerror=alert(1)>\x1b[31m</script>"
    page.fill("#prompt", hostile)
    page.fill("#seed", "3")
    page.click("#go")
    expect(page.locator("#say")).to_have_text(re.compile(r"^\d+ tokens, \d+ a second"))
    expect(page.locator("#stop")).to_be_disabled(timeout=30_000)
    assert page.locator("#text").text_content().startswith(hostile)
    assert page.locator("#text img, h1 i").count() == 0
    assert page.locator("h1").text_content() == NAME
    first = page.locator("#text").text_content()

    token = page.locator("#text span:not(.given)").nth(3)
    token.hover()
    expect(page.locator("#card button")).to_have_count(10)
    shares = [float(words.rstrip(" %")) for words in page.locator("#card small").all_text_contents()]
    assert shares == sorted(shares, reverse=True)
    page.locator("#card button").nth(1).click()  # go on from another token
    expect(page.locator("#stop")).to_be_disabled(timeout=30_000)
    assert page.locator("#text").text_content() != first

    page.fill("#prompt", "The list")
    page.locator("#step").press("Home")
    expect(page.locator("#answers article")).to_have_count(1)
    page.click("#all")
    expect(page.locator("#answers h3")).to_have_text(["step 1", "step 3", "step 6"])
    for i in range(3):
        expect(page.locator("#answers .tokens").nth(i)).to_have_text(re.compile("^The list.{20}", re.DOTALL))

    page.click("#look button")
    expect(page.locator("#told")).to_have_text(re.compile(r"^\d+\.\d+ nats per token"))
    page.locator("#seen span").nth(4).click()
    expect(page.locator("#seen .on")).to_have_count(1)
    assert page.locator("#map").is_visible()
    assert page.locator("svg:visible").count() == 1

    page.locator("#max_tokens").press("End")
    page.fill("#prompt", "a")
    page.click("#go")
    page.click("#stop")
    expect(page.locator("#say")).to_have_text(re.compile("stopped|ended|500 tokens"))
    page.fill("#prompt", "word " * 100)
    page.click("#go")
    expect(page.locator("#say.error")).to_have_text("the prompt has 101 tokens, the model reads 64")
    overflow = page.locator("main").bounding_box()["width"]
    assert overflow <= width
    assert [text for text in wrong if "400" not in text] == []
    page.close()

"""The running demo over HTTP: its endpoints through Gradio's client, and what a visitor with bad intentions sends."""

from __future__ import annotations

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from demos import Settings, serve
from demos.server import Server
from mmeff.registry import build
from mmeff.video_io import read

FEW = {"num_inference_steps": 3}
RADIAL = {"method": "radial", "block": 4, "dense_layers": 0, "drop_below": 32, "dense_steps": 1}


@pytest.fixture(scope="module")
def server():
    running = serve(Settings(models=("tiny-video",), per_user=2, max_upload_mb=0.5), port=None, warm=False)
    yield running
    running.close()


@pytest.fixture
def client(server, tmp_path):
    return Client(server.url, verbose=False, download_files=str(tmp_path))


def generate(client, prompt="a red square moving left", **fields):
    given = {"model": "tiny-video", "methods": [RADIAL], "seed": 0, "sizes": FEW, **fields}
    return client.predict(prompt, **given, api_name="/generate")


def test_it_listens_on_this_machine_alone(server):
    assert server.url.startswith("http://127.0.0.1:")


def test_models_methods_and_plans(client):
    assert client.predict(api_name="/models")[0]["name"] == "tiny-video"
    methods = client.predict(api_name="/methods")
    radial = next(one for one in methods if one["method"] == "radial")
    assert {"name": "decay", "type": "float"}.items() <= next(
        f for f in radial["fields"] if f["name"] == "decay"
    ).items()
    plan = client.predict(model="tiny-video", methods=[RADIAL], sizes={"num_inference_steps": 20}, api_name="/plan")
    assert 0.4 < plan["radial"]["density"] < 0.6
    with pytest.raises(AppError, match="stage must be one of pruning, diffusion_attn"):
        client.predict(stage="nonsense", api_name="/methods")


def test_generate_and_its_files(client):
    found = generate(client, "a blue ring moving up", methods=[RADIAL, "gna"], seed=4)
    assert [one["name"] for one in found["variants"]] == ["dense", "radial", "gna"]
    assert found["prompt"] == "a blue ring moving up" and found["seed"] == 4 and found["environment"]["cpu"]
    dense, radial = (one["files"] for one in found["variants"][:2])
    assert read(dense["media"]).frames.shape == (17, 48, 48, 3)
    assert build(Path(radial["config"])).decay == 0.2 and Path(radial["pair"]).suffix == ".mp4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "the prompt is empty"),
        ({"model": "/etc/passwd"}, "model must be one that this demo offers"),
        ({"methods": "radial"}, "methods must be a list"),
        ({"methods": ["/etc/x.yaml"]}, "no method is called"),
        ({"methods": [{"method": "cacovid", "policy": "/etc"}]}, "names something on the server"),
        ({"methods": [{"method": "radial", "decay": "fast"}]}, "Radial.decay must be"),
        ({"methods": ["fastv"]}, "method of stage pruning"),
        ({"sizes": {"latents": 3}}, "sizes may hold height"),
        ({"sizes": [3]}, "sizes must be a mapping"),
        ({"sizes": {"num_inference_steps": 10**9}}, "steps must be a whole number"),
        ({"seed": "x"}, "the seed must be"),
        ({"image": {"path": "/etc/passwd"}}, "the image must be a file that was uploaded here"),
        ({"image": "/etc/passwd"}, "the image must be a file that was uploaded here"),
    ],
)
def test_mistakes_are_messages(server, client, change, message):
    with pytest.raises(AppError, match=message) as caught:
        generate(client, **change)
    assert "Traceback" not in str(caught.value) and "site-packages" not in str(caught.value)
    assert server.service.turns.waiting == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"no picture", "no picture of a kind"),
        ("empty.png", b"", "is empty"),
        ("a.svg", b"<svg onload='alert(1)'/>", "no picture of a kind"),
        ("large.png", b"x" * 600_000, "(?i)size|large|413"),
    ],
    ids=["text", "empty", "svg", "large"],
)
def test_uploads_that_are_refused(client, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Exception, match=message):
        generate(client, image=handle_file(str(tmp_path / name)))
    assert client.predict(api_name="/models")


def test_a_picture_for_a_model_that_takes_none(client, tmp_path):
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(AppError, match="makes videos from text and takes no image"):
        generate(client, image=handle_file(str(tmp_path / "a.png")))


def test_ten_requests_of_one_visitor_and_of_ten(server):
    one = Client(server.url, verbose=False)
    jobs = [
        one.submit("a red square moving left", "tiny-video", [RADIAL], seed, FEW, api_name="/generate")
        for seed in range(10)
    ]
    told = []
    for job in jobs:
        try:
            told.append(job.result(timeout=120)["seed"])
        except AppError as error:
            told.append(str(error))
    refused = [text for text in told if isinstance(text, str)]
    assert refused and all("runs waiting or running, and 2 is the most at a time" in text for text in refused)
    assert len(refused) <= 8 and server.service.turns.waiting == 0

    many = [Client(server.url, verbose=False) for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        found = list(
            pool.map(lambda pair: generate(pair[1], seed=pair[0], sizes={"num_inference_steps": 2}), enumerate(many))
        )
    assert [one["seed"] for one in found] == list(range(10))
    assert all([v["name"] for v in one["variants"]] == ["dense", "radial"] for one in found)


def test_cancel(server, client):
    job = client.submit(
        "a red square moving left", "tiny-video", [RADIAL], 123, {"num_inference_steps": 100}, api_name="/generate"
    )
    while not server.service.turns.waiting:
        threading.Event().wait(0.05)
    other = Client(server.url, verbose=False)
    assert other.predict(api_name="/cancel") == 0
    assert client.predict(api_name="/cancel") == 1
    with pytest.raises(AppError, match="cancelled"):
        job.result(timeout=60)
    assert server.service.turns.waiting == 0


# ---------------------------------------------------------------- without Gradio's client, which is polite


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


def post(http, function, data):
    """Call a function by its number, as the page does; the messages that come back."""
    session = uuid.uuid4().hex
    body = {"data": data, "fn_index": function, "session_hash": session}
    joined = http.post("gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.text
    with http.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as stream:
        text = ""
        for line in stream.iter_lines():
            text += line
            if "process_completed" in line or "close_stream" in line:
                return text
    return text


def function(http, name):
    config = http.get("config").json()
    return next(one["id"] for one in config["dependencies"] if one["api_name"] == name)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "/proc/self/environ"])
def test_a_path_outside_the_uploads_through_the_queue(http, path):
    given = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answer = post(http, function(http, "generate"), ["p", "tiny-video", [RADIAL], 0, FEW, given])
    assert (
        "root:" not in answer
        and "PATH=" not in answer
        and '"success": true' not in answer
        and "Traceback" not in answer
    )
    assert http.get("").status_code == 200


def test_a_path_outside_the_uploads_through_the_pages_own_functions(http):
    """The page's functions take the image as a component."""
    config = http.get("config").json()
    image = next(one["id"] for one in config["components"] if "First frame" in str(one["props"].get("label")))
    own = [one for one in config["dependencies"] if image in one["inputs"]]
    values = {one["id"]: one["props"].get("value") for one in config["components"]}
    assert len(own) >= 3
    for one in own:
        data = [values[name] for name in one["inputs"]]
        if one["trigger_mode"] == "always_last":  # the plan
            assert '"success":true' in post(http, one["id"], data)  # so that what follows is refused for the path alone
        data[one["inputs"].index(image)] = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        answer = post(http, one["id"], data)
        assert '"success":false' in answer and "root:" not in answer and "Traceback" not in answer
    assert http.get("").status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        "gradio_api/file=/etc/passwd", "gradio_api/file=/proc/self/environ", "gradio_api/file=demos/app.py",
        "gradio_api/file=../../etc/passwd", "file=/etc/passwd", "static/../../../../etc/passwd", "runs/x/y", "runs/../x",
        "runs/..%2f..%2fetc/passwd", "theme.css/../../etc/passwd",
    ],
)  # fmt: skip
def test_no_file_of_the_server_is_served(http, address):
    answer = http.get(address)
    assert answer.status_code in (403, 404) and "root:" not in answer.text and "import gradio" not in answer.text


def test_files_of_runs_are_served_by_name_and_range(http, server, client):
    generate(client)
    run = next(reversed(server.service.runs._runs.values()))
    whole = http.get(f"runs/{run.name}/dense.mp4")
    assert whole.status_code == 200 and whole.headers["content-type"] == "video/mp4"
    part = http.get(f"runs/{run.name}/dense.mp4", headers={"Range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == b"ftyp"
    assert http.get(f"runs/{run.name}/dense.npy").status_code == 404
    assert http.get(f"gradio_api/file={run.folder}/dense.npy").status_code == 403
    assert http.get(f"gradio_api/file={run.folder}/dense.mp4").status_code == 403


def test_markup_in_a_prompt_stays_text(client):
    nasty = "<script>alert(1)</script>"
    assert generate(client, nasty)["prompt"] == nasty


def test_nothing_calls_home(http):
    config = http.get("config").json()
    assert config["analytics_enabled"] is False and config.get("footer_links") == []
    page = http.get("").text
    for host in ("googleapis", "gstatic", "cdnjs", "jsdelivr", "huggingface.co"):
        assert f"//fonts.{host}" not in page and f'src="https://{host}' not in page
    assert json.loads(http.get("gradio_api/info").text)["named_endpoints"]


def test_a_server_that_is_closed_loads_no_further_model(tmp_path):
    loaded = []
    models = SimpleNamespace(
        offers={n: SimpleNamespace(name=n, embedded=True) for n in "abc"}, load=lambda offer: load(offer)
    )
    service = SimpleNamespace(models=models, turns=SimpleNamespace(waiting=[]), close=lambda: None)
    begun = threading.Event()

    def load(offer):
        loaded.append(offer.name)
        begun.set()
        assert running._closed.wait(20)

    app = SimpleNamespace(close=lambda verbose: None)
    running = Server(app, service, "", None, str(tmp_path / "uploads"), warm=True)
    assert begun.wait(60)
    running.close()
    running._warming.join(20)
    assert loaded == ["a"] and not running._warming.is_alive()

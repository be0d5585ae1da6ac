"""Clients that others wrote, unmodified: OpenAI's in JavaScript, simonw's llm, Open WebUI's requests, schemathesis."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .serving import data_uri

pytestmark = pytest.mark.slow

WEB = Path(__file__).parents[2] / "web"
QUESTION = "which colour is the red cup left of the star ?"
JAVASCRIPT = """
import OpenAI from "openai";
const [url, picture, question] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none" });
const messages = [{ role: "user", content: [
  { type: "image_url", image_url: { url: picture } }, { type: "text", text: question }] }];
const whole = await client.chat.completions.create({ model: "tiny", messages, max_tokens: 20 });
let streamed = "";
for await (const event of await client.chat.completions.create({
  model: "tiny", messages, max_tokens: 20, stream: true, stream_options: { include_usage: true } })) {
  streamed += event.choices[0]?.delta?.content ?? "";
}
const vector = (await client.embeddings.create({ model: "tiny", input: "a red cup" })).data[0].embedding;
const models = (await client.models.list()).data.map((model) => model.id);
let refusal = null;
try { await client.chat.completions.create({ model: "other", messages }); } catch (error) { refusal = error.status; }
const said = { whole: whole.choices[0].message.content, streamed, width: vector.length, models, refusal };
console.log(JSON.stringify(said));
"""


def test_openais_javascript_client_works_unmodified(served, alone, images, tmp_path):
    if not (WEB / "node_modules" / "openai").is_dir() or shutil.which("node") is None:
        pytest.skip("OpenAI's JavaScript client is not installed: npm ci in web/")
    (tmp_path / "node_modules").symlink_to(WEB / "node_modules")
    script = tmp_path / "client.mjs"
    script.write_text(JAVASCRIPT, encoding="utf-8")
    command = ["node", script, served.url, data_uri(images[0]), QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = alone.ask(images[0], QUESTION, max_new_tokens=20)
    assert found["whole"] == found["streamed"] == expected
    assert found["width"] == alone.embed_texts("a").shape[1]
    assert found["models"] == ["tiny"] and found["refusal"] == 404


def test_llm_with_an_attachment_prints_the_answer(served, alone, images, tmp_path):
    if find_spec("llm") is None:
        pytest.skip("llm is not installed: pip install llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: tiny\n  api_base: {served.url}/v1\n  vision: true\n", encoding="utf-8"
    )
    images[0].save(tmp_path / "picture.png")
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "llm", "-m", "tiny", "-a", tmp_path / "picture.png", "-o", "max_tokens", "20"]
    for more in ([], ["--no-stream"]):
        done = subprocess.run(
            [*command, *more, QUESTION], capture_output=True, text=True, env=environment, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == alone.ask(images[0], QUESTION, max_new_tokens=20)


def test_open_webuis_requests_are_answered(served, alone, images):
    assert [model["id"] for model in served.send("/v1/models").json["data"]] == ["tiny"]
    picture = data_uri(images[0])
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": picture}}]
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": content},
    ]
    events = served.stream(*turns, max_tokens=20)
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-2])
    assert text == alone.ask(images[0], QUESTION, max_new_tokens=20)
    assert (
        served.chat(*turns, {"role": "assistant", "content": text}, {"role": "user", "content": "why ?"}).status == 200
    )


def test_schemathesis_finds_no_failure(served, tmp_path):
    if find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed: pip install schemathesis")
    command = [
        *(Path(sys.executable).with_name("schemathesis"), "run", f"{served.url}/openapi.json"),
        *("--max-examples", "60", "--seed", "1", "--workers", "1", "--request-timeout", "60"),
        # a text that fits the schema need not be a picture, and a 4xx that says so is right
        *("--exclude-checks", "positive_data_acceptance"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-6000:]

"""Chats over HTTP say what the model says, whole and streamed; what cannot be honoured is refused."""

import http.client
import json
from urllib.parse import urlsplit

import numpy as np
import pytest

import blip2
from blip2.inference.safety import WordList
from blip2.preprocessing.prompts import dialogue
from blip2.server.settings import Limits, ServerSettings

from .serving import assistant, becomes, data_uri, serving, user

ASKED = "which colour is the red cup left of the star ?"


def test_a_question_gets_the_models_answer(served, alone, images):
    answer = served.chat(user(images[0], ASKED), max_tokens=20)
    assert answer.status == 200
    assert answer.content == alone.ask(images[0], ASKED, max_new_tokens=20)
    assert answer.json["object"] == "chat.completion" and answer.json["model"] == "tiny"
    usage = answer.json["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 1 <= usage["completion_tokens"] <= 20


def test_a_picture_alone_gets_its_caption(served, alone, images):
    assert served.chat(user(images[0]), max_tokens=12).content == alone.caption(images[0], max_new_tokens=12)
    three = served.chat(user(images[1]), max_tokens=12, best_of=3).content
    assert three == alone.caption(images[1], best_of=3, max_new_tokens=12)


def test_what_was_said_before_is_remembered(served, alone, images):
    turns = [user(images[0], "what is this ?"), assistant("a red cup"), user("how many ?")]
    prompt = dialogue([("what is this ?", "a red cup")], "how many ?", alone.settings.prompts.question)
    assert [served.chat(*turns, max_tokens=9).content] == alone.generate(
        images[:1], prompt, "how many ?", max_new_tokens=9
    )


def test_each_picture_has_its_own_thread(served, alone, images):
    turns = [
        user(images[0], "what is this ?"),
        assistant("a cup"),
        user(images[1], "which colour ?"),
        assistant("red"),
    ]
    template = alone.settings.prompts.question
    first = dialogue([("what is this ?", "a cup")], "how many ?", template)
    second = dialogue([("which colour ?", "red")], "how many ?", template)
    about_first = alone.generate(images[:1], first, "how many ?", max_new_tokens=9)
    about_second = alone.generate(images[1:2], second, "how many ?", max_new_tokens=9)
    assert [served.chat(*turns, user("how many ?"), max_tokens=9).content] == about_second
    assert [served.chat(*turns, user("Image 1: how many ?"), max_tokens=9).content] == about_first
    assert [served.chat(*turns, user("how many ?", image=1), max_tokens=9).content] == about_first
    assert "no picture 3" in served.chat(*turns, user("how many ?", image=3)).message
    both = served.chat(user(images[0], images[1], "how many ?"))
    assert both.status == 400 and "several pictures in one turn" in both.message


def test_a_system_line_guides(served, alone, images):
    system = {"role": "system", "content": "red red star"}
    prompt = "red red star " + dialogue([], "how many ?", alone.settings.prompts.question)
    assert [served.chat(system, user(images[0], "how many ?"), max_tokens=9).content] == alone.generate(
        images[:1], prompt, "how many ?", max_new_tokens=9
    )


def test_a_history_that_is_too_long_is_cut_and_the_reply_says_so(tiny_folder, images):
    limits = Limits(messages=900)
    turns = [message for _ in range(400) for message in (user(ASKED), assistant("the red cup of the star"))]
    with serving(blip2.load(tiny_folder), ServerSettings(name="tiny", limits=limits)) as running:
        answer = running.chat(user(images[0], "why ?"), assistant("a"), *turns, user(ASKED), max_tokens=4)
        assert answer.status == 200
        (warning,) = answer.json["warnings"]
        assert "turns were left out" in warning
        events = running.stream(user(images[0], "why ?"), assistant("a"), *turns, user(ASKED), max_tokens=4)
        assert events[-3]["warnings"] == [warning]


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, {"min_tokens": 9}, {"n": 3}, {"max_tokens": 3}])
def test_a_stream_is_the_whole_answer_to_the_byte(served, images, options):
    options = {"max_tokens": 20} | options
    whole = served.chat(user(images[0], ASKED), **options).json
    *events, usage, done = served.stream(user(images[0], ASKED), **options)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]]


def test_text_ends_before_a_stop_string(served, images):
    whole = served.chat(user(images[0], ASKED), max_tokens=30).content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    expected = whole[: whole.index(stop)]
    stopped = served.chat(user(images[0], ASKED), max_tokens=30, stop=[stop, "no such"]).json["choices"][0]
    assert stopped["message"]["content"] == expected and stopped["finish_reason"] == "stop"
    events = served.stream(user(images[0], ASKED), max_tokens=30, stop=stop)
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events[:-2]]
    assert "".join(deltas) == expected


def test_chance_draws_different_texts(served, images):
    drawn = served.chat(user(images[0], ASKED), temperature=1.5, n=8, max_tokens=12).json["choices"]
    assert len({choice["message"]["content"] for choice in drawn}) > 3
    told = served.chat(user(images[0], ASKED), temperature=1.5, seed=1).json["warnings"]
    assert "seed has no effect" in told[0]


def test_who_leaves_stops_the_model(served, images):
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=60)
    body = {"model": "tiny", "messages": [user(images[0], ASKED)], "stream": True, "max_tokens": 450, "min_tokens": 450}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().read(1200)  # the first pieces
    assert served.service.engine.num_writing == 1
    connection.sock.close()
    connection.close()
    first = served.service.engine.num_steps
    while served.service.engine.num_writing:
        assert served.service.engine.num_steps - first < 400, "the model went on writing for nobody"
    assert becomes(lambda: served.service._num_admitted == 0)


def test_an_answer_that_a_filter_refuses_is_cut_and_a_request_is_not_asked(tiny_folder, alone, images):
    said = alone.ask(images[0], "what is this ?", max_new_tokens=30)
    settings = ServerSettings(name="tiny", filter=WordList([said, "cup"]))
    with serving(blip2.load(tiny_folder), settings) as running:
        choice = running.chat(user(images[0], "what is this ?"), max_tokens=30).json["choices"][0]
        assert choice["finish_reason"] == "content_filter" and said not in choice["message"]["content"]
        events = running.stream(user(images[0], "what is this ?"), max_tokens=30)
        assert said not in "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-2])
        assert events[-3]["choices"][0]["finish_reason"] == "content_filter"
        refused = running.chat(user(images[0], "what is a CUP ?"))
        assert refused.status == 400 and refused.json["error"]["code"] == "content_filter"
        assert "cup" not in refused.message.lower()


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "gpt"}, 404, "There is no model of this name here; it is 'tiny'."),
        ({"foo": 1}, 400, "foo: is not a field"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 513}, 400, "At most 512 tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "differ"),
        ({"n": 9}, 400, "at most 8 answers"),
        ({"n": 10**6}, 400, "n: "),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"best_of": 3}, 400, "best_of chooses among captions"),
        ({"stop": [""]}, 400, "A stop text is empty"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [user("what ?")]}, 400, "There is no picture"),
        ({"messages": [assistant("a")]}, 400, "The last message must be the user's"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
        ({"messages": [user("https://example.org/a.png")]}, 400, "There is no picture"),
        ({"stop": list("abcde")}, 400, "stop: List should have at most 4 items"),
        ({"min_tokens": 9, "max_tokens": 5}, 400, "min_tokens is 9, and at most 5 are written"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options has no effect without stream"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content: Field required"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content: "),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text: Field"),
        ({"messages": [{"role": "user", "content": [{"type": "a"}]}]}, 400, "messages[0].content[0]: Input tag 'a'"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, 400, "messages[0].content[0]: Unable to"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]},
            400,
            "messages[0].content[0].image_url.url: Input should be a valid string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages[0].content[0].image_url.url: Field required",
        ),
        ({"messages": [user("what ?") | {"nme": "a"}]}, 400, "messages[0].nme: is not a field"),
    ],
)
def test_what_cannot_be_honoured_is_refused(served, images, change, status, message):
    body = {"model": "tiny", "messages": [user(images[1], "what ?")]} | change
    answer = served.send("/v1/chat/completions", body)
    assert answer.status == status and message in answer.message
    assert answer.json["error"].keys() == {"message", "type", "param", "code"}


def test_what_clients_send_besides_is_taken(served, alone, images):
    expected = alone.ask(images[0], ASKED, max_new_tokens=20)
    url = data_uri(images[0])
    head, comma, written = url.partition(",")
    in_lines = "\r\n".join(written[place : place + 76] for place in range(0, len(written), 76))
    turn = user(images[0], ASKED)
    turn["content"][0]["image_url"]["url"] = head + comma + in_lines
    assert served.chat(turn, max_tokens=20).content == expected
    refused = {"role": "assistant", "content": None, "refusal": "no"}
    assert served.chat(user(images[0], "what ?"), refused, user(ASKED), max_tokens=20).content == expected
    assert served.chat(user(images[0], ASKED), max_tokens=20, temperature=1e-5, top_p=0.5).content == expected


def test_openais_client_works_unmodified(served, alone, images):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    messages = [user(images[0], ASKED)]
    expected = alone.ask(images[0], ASKED, max_new_tokens=20)
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20)
    assert whole.choices[0].message.content == expected and whole.usage.total_tokens > 0
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in stream) == expected
    assert [model.id for model in client.models.list()] == ["tiny"]
    vector = client.embeddings.create(model="tiny", input="a red cup").data[0].embedding
    assert vector == pytest.approx(alone.embed_texts("a red cup")[0].tolist(), abs=1e-6)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)


def test_vectors_and_matches_are_the_models(served, alone, images):
    texts = ["a red cup", "a star", "the cat"]
    rows = served.send("/v1/embeddings", {"model": "tiny", "input": texts}).json["data"]
    np.testing.assert_allclose([row["embedding"] for row in rows], alone.embed_texts(texts), atol=1e-6)
    found = served.send("/v1/embeddings", {"model": "tiny", "messages": [user(images[0])]}).json["data"][0]["embedding"]
    mean = alone.embed_images(images[0])[0].mean(axis=0)
    assert found == pytest.approx((mean / (mean**2).sum() ** 0.5).tolist(), abs=1e-6)
    body = {"model": "tiny", "text_1": texts, "text_2": {"content": [user(images[0])["content"][0]]}}
    scores = served.send("/v1/score", body).json["data"]
    expected = alone.match(images[0], texts)
    assert [row["score"] for row in scores] == pytest.approx([match.itm for match in expected], abs=1e-5)
    assert [row["itc"] for row in scores] == pytest.approx([match.itc for match in expected], abs=1e-5)
    assert served.send("/v1/embeddings", {"model": "tiny"}).status == 400
    assert served.send("/v1/embeddings", {"model": "tiny", "input": " "}).status == 400
    assert data_uri(images[0]).startswith("data:image/png;base64,")


def test_attention_covers_the_picture_and_every_word(served, images):
    body = {"model": "tiny", "messages": [user(images[0], ASKED)], "answer": "the red cup", "by_word": True}
    found = served.send("/v1/attention", body).json
    rows, columns = found["grid"]
    assert len(found["queries"]) == found["num_queries"] and len(found["average"]) == rows * columns
    assert all(sum(one) == pytest.approx(1, abs=1e-4) for one in [*found["queries"], found["average"]])
    assert "".join(word["text"] for word in found["words"]) == "the red cup"
    assert all(sum(word["weights"]) == pytest.approx(1, abs=1e-4) for word in found["words"])

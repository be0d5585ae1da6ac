"""The server under load, overload, disconnects, slow clients and bombs: the table of docs/serving.md.

    python benchmarks/server.py --work build/server

`blip2 serve` runs as a process of its own beside the clients, on the same cores. What it answers is compared, text for
text, with what the engine gives without any server; the engine's own rate is measured in the same run, before. What
tests hold is run and counted after that (server_proofs.py).
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import re
import signal
import statistics
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from server_proofs import note_proofs

import blip2
from blip2.evaluation.speed import machine, picture
from blip2.inference.decoding import make_decoding
from blip2.inference.engine import Engine
from blip2.preprocessing.prompts import question_prompt

QUESTIONS = ["What is in the picture?", "What colour is it?", "Is there a cat in the picture?", "How many are there?"]
NUM_PICTURES = 200


@dataclass(frozen=True)
class Asked:
    """One request of the load: a picture, a question and how many tokens the answer has."""

    picture: int
    question: str
    length: int

    def body(self, pictures: list[str], *, stream: bool = False) -> dict[str, Any]:
        """As /v1/chat/completions takes it."""
        parts = [
            {"type": "image_url", "image_url": {"url": pictures[self.picture]}},
            {"type": "text", "text": self.question},
        ]
        return {
            "model": "mini",
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": self.length,
            "min_tokens": self.length,
            "stream": stream,
        }


class Server:
    """`blip2 serve` as a process."""

    def __init__(self, model: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "blip2.cli.main", "serve", "--model", model, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                return
        raise SystemExit("the server did not start")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def held(self) -> dict[str, float]:
        """Threads, open files and own memory in MB."""
        place = Path(f"/proc/{self.process.pid}")
        fields = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        return {
            "threads": int(fields["Threads"]),
            "files": len(os.listdir(place / "fd")),
            "MB": int(fields["RssAnon"].split()[0]) / 1000,
        }


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--disconnects", type=int, default=1000)
    parser.add_argument("--soak-minutes", type=float, default=30)
    parser.add_argument("--no-proofs", action="store_true", help="leave out what tests hold (server_proofs.py)")
    args = parser.parse_args()
    images = [picture(i).resize((256, 256)) for i in range(NUM_PICTURES)]
    pictures = [_data_uri(image) for image in images]
    wanted = [Asked(i % NUM_PICTURES, QUESTIONS[i % 4], 4 + i * 7 % 13) for i in range(args.requests)]
    rows: list[tuple[str, str, str, str]] = []

    def note(*row: str) -> None:
        rows.append(row)
        print("  ".join(row), file=sys.stderr, flush=True)

    expected, offline = _offline(args.model, images, wanted[: max(500, args.requests // 5)])
    with Server(args.model, "--max-admitted", str(args.clients)) as server:
        asyncio.run(_measure(server, pictures, wanted, expected, offline, args, note))
        _stop_with_eight_in_flight(server, pictures, note)
    holds = args.no_proofs or note_proofs(note)
    heading = ("", "what", "target", "measured")
    table = [heading, ("---",) * 4, *rows]
    text = "\n".join("| " + " | ".join(row) + " |" for row in table)
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "server.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    (args.work / "server.md").write_text(text + "\n")
    print(text)
    sys.exit(not holds)


def _offline(model: str, images: list[Any], wanted: list[Asked]) -> tuple[dict[Asked, str], float]:
    """What the engine says to each request, and how many it answers a second with all at hand from the start.

    The pictures were seen before, as the server's have been after its warm-up.
    """
    loaded = blip2.load(model)
    template = loaded.settings.prompts.question
    with Engine(loaded, max_waiting=10**6) as engine:

        def answer(some: list[Asked]) -> dict[Asked, str]:
            replies = []
            for one in some:
                decoding = make_decoding({"max_new_tokens": one.length, "min_new_tokens": one.length})
                prompt = question_prompt(one.question, template)
                replies.append(engine.submit(images[one.picture], prompt, one.question, decoding=decoding))
            return {one: reply.text().strip() for one, reply in zip(some, replies, strict=True)}

        answer(wanted[:NUM_PICTURES])
        begin = time.perf_counter()
        texts = answer(wanted)
        return texts, len(wanted) / (time.perf_counter() - begin)


async def _measure(
    server: Server,
    pictures: list[str],
    wanted: list[Asked],
    expected: dict[Asked, str],
    offline: float,
    args: argparse.Namespace,
    note: Any,
) -> None:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        await _load(client, pictures, wanted[:NUM_PICTURES], {}, args.clients)  # warms up
        statuses, wrong, seconds, health = await _load(client, pictures, wanted, expected, args.clients)
        rate = len(wanted) / seconds
        errors = sum(status >= 500 for status in statuses)
        note(
            "S1", f"{len(wanted)} requests of {args.clients} clients", "0 wrong, 0 5xx", f"{wrong} wrong, {errors} 5xx"
        )
        share = rate / offline
        note(
            "S1", "rate beside the engine's own", "at least 0.9", f"{share:.2f} ({rate:.1f} and {offline:.1f} a second)"
        )
        note("S3", "/healthz meanwhile, p99", "100 ms", f"{_p99(health) * 1000:.0f} ms of {len(health)}")
        await _overload(client, pictures, wanted, rate, args.clients * 4, note)
        await _disconnect(server, client, pictures, args.disconnects, note)
        await _slow_clients(server, client, note)
        await _bombs(server, client, note)
        await _streams(client, pictures, wanted[:100], note)
        await _sums(client, note)
        if args.soak_minutes:
            await _soak(server, client, pictures, wanted, args, note)


async def _load(
    client: Any, pictures: list[str], wanted: list[Asked], expected: dict[Asked, str], num_clients: int
) -> tuple[list[int], int, float, list[float]]:
    """Statuses, wrong texts, seconds, and /healthz's times: closed loop, each client one request after the other."""
    todo, statuses, wrong = iter(wanted), [], 0

    async def work() -> None:
        nonlocal wrong
        for one in todo:
            answer = await client.post("/v1/chat/completions", json=one.body(pictures))
            statuses.append(answer.status_code)
            if answer.status_code != 200:
                wrong += 1
            elif one in expected:
                wrong += answer.json()["choices"][0]["message"]["content"].strip() != expected[one]

    begin = time.perf_counter()
    tasks = [asyncio.create_task(work()) for _ in range(num_clients)]
    health = await _probe(client, "/healthz", tasks)
    await asyncio.gather(*tasks)
    return statuses, wrong, time.perf_counter() - begin, health


async def _probe(client: Any, path: str, tasks: list[Any]) -> list[float]:
    found = []
    while not all(task.done() for task in tasks):
        begin = time.perf_counter()
        answer = await client.get(path)
        assert answer.status_code == 200
        found.append(time.perf_counter() - begin)
        await asyncio.sleep(0.1)
    return found


async def _overload(
    client: Any, pictures: list[str], wanted: list[Asked], peak: float, num_clients: int, note: Any
) -> None:
    refused, accepted, hints = [], [], []
    # more at once than the server takes, however few were asked for
    todo = itertools.islice(itertools.cycle(wanted), max(len(wanted) // 4, 2 * num_clients))

    async def work(number: int) -> None:
        await asyncio.sleep(number * 0.02)  # one process plays all clients: it must not be what is waited for
        for one in todo:
            while True:
                begin = time.perf_counter()
                answer = await client.post("/v1/chat/completions", json=one.body(pictures))
                taken = time.perf_counter() - begin
                if answer.status_code == 200:
                    accepted.append(taken)
                    break
                assert answer.status_code == 429, answer.text
                refused.append(taken)
                hints.append(int(answer.headers["retry-after"]))
                await asyncio.sleep(min(hints[-1], 3))

    begin = time.perf_counter()
    await asyncio.gather(*(work(number) for number in range(num_clients)))
    goodput = len(accepted) / (time.perf_counter() - begin)
    note("S2", f"{num_clients} clients: refusals with Retry-After, p99", "250 ms", f"{_p99(refused) * 1000:.0f} ms")
    note("S2", "goodput beside the peak", "at least 0.9", f"{goodput / peak:.2f}")
    longest = f"{max(accepted):.1f} s, median {statistics.median(accepted):.1f} s"
    note("S2", f"longest wait of the {len(accepted)} accepted", "none starves", longest)


async def _disconnect(server: Server, client: Any, pictures: list[str], count: int, note: Any) -> None:
    before = server.held()
    stops = []

    async def leave(number: int) -> None:
        body = Asked(number % NUM_PICTURES, QUESTIONS[0], 300).body(pictures, stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if '"content": "' in line and '"role"' not in line:
                    break

    for first in range(0, count, 8):
        await asyncio.gather(*(leave(first + i) for i in range(8)))
        begin = time.perf_counter()
        while await _figure(client, "blip2_writing") > 0:
            await asyncio.sleep(0.005)
        stops.append(time.perf_counter() - begin)
    await asyncio.sleep(1)
    after = server.held()
    note(
        "S4",
        f"{count} disconnects in mid-stream: until nothing is written",
        "2 steps",
        f"{_p99(stops) * 1000:.0f} ms p99",
    )
    gone = f"{after['threads'] - before['threads']:+} threads, {after['files'] - before['files']:+} files"
    note("S4", "left behind", "nothing", f"{gone}, {await _figure(client, 'blip2_admitted'):.0f} places")


async def _figure(client: Any, name: str) -> float:
    text = (await client.get("/metrics")).text
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(f"{name} ")))


async def _slow_clients(server: Server, client: Any, note: Any) -> None:
    place = httpx2.URL(server.url)
    held = []
    for i in range(250):
        reader, writer = await asyncio.open_connection(place.host, place.port)
        head = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n"
        writer.write((head + ("\r\n" * (i >= 200))).encode())  # 200 never end their headers, 50 never read
        held.append((reader, writer))
    found = []
    for _ in range(200):
        begin = time.perf_counter()
        assert (await client.get("/v1/models")).status_code == 200
        found.append(time.perf_counter() - begin)
    for _, writer in held:
        writer.close()
    note("S7", "200 slow headers, 50 that do not read: others, p99", "200 ms", f"{_p99(found) * 1000:.0f} ms")


def _bomb_files() -> dict[str, bytes]:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"\0" * 50_000) + chunk(b"IEND", b"")
    jpeg = b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xd9"
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(b"\0" * 50_000_000))
    one = struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)
    texts = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", one) + text * 4 + chunk(b"IEND", b"")
    return {
        "png": png,
        "jpeg": jpeg,
        "text": texts,
        "tiff": b"II*\0" + b"\0" * 99,
        "svg": b"<svg/>",
        "pdf": b"%PDF-1.7",
    }


async def _bombs(server: Server, client: Any, note: Any) -> None:
    before, taken, statuses = server.held()["MB"], [], set()
    for data in [*_bomb_files().values()] * 5:
        body = Asked(0, "What?", 4).body([f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"])
        begin = time.perf_counter()
        answer = await client.post("/v1/chat/completions", json=body)
        taken.append(time.perf_counter() - begin)
        statuses.add(answer.status_code)
    grown = server.held()["MB"] - before
    measured = f"{sorted(statuses)}, {max(taken) * 1000:.0f} ms at most, {grown:+.0f} MB"
    note("S9", "bombs of pixels and text, other formats renamed", "400, 100 ms, 50 MB", measured)


async def _streams(client: Any, pictures: list[str], wanted: list[Asked], note: Any) -> None:
    equal = 0
    for one in wanted:
        whole = (await client.post("/v1/chat/completions", json=one.body(pictures))).json()
        body = one.body(pictures, stream=True) | {"stream_options": {"include_usage": True}}
        lines = (await client.post("/v1/chat/completions", json=body)).text.split("\n\n")
        events = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
        is_same = text == whole["choices"][0]["message"]["content"] and events[-1]["usage"] == whole["usage"]
        equal += is_same
    note("S18", "stream equals whole answer, and its usage", "all", f"{equal} of {len(wanted)}")


async def _sums(client: Any, note: Any) -> None:
    async def total() -> float:
        lines = (await client.get("/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("blip2_requests_total{"))

    before = await total()
    for _ in range(50):
        await client.get("/healthz")
        await client.get("/nothing")
        await client.post("/v1/chat/completions", json={})
    counted = await total() - before - 1  # the question itself, which is counted after it is answered
    note("S20", "outcomes counted beside requests sent", "equal", f"{counted:.0f} of 150")


async def _soak(
    server: Server, client: Any, pictures: list[str], wanted: list[Asked], args: argparse.Namespace, note: Any
) -> None:
    end = time.perf_counter() + args.soak_minutes * 60
    begin, seen = time.perf_counter(), []
    while time.perf_counter() < end:
        await _load(client, pictures, wanted[:256], {}, args.clients)
        seen.append(((time.perf_counter() - begin) / 60, server.held()["MB"]))
    late = seen[len(seen) // 5 :]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope
    note("S21", f"{args.soak_minutes:g} minutes: growth of memory", "1 MB a minute", f"{slope:+.2f} MB a minute")


def _stop_with_eight_in_flight(server: Server, pictures: list[str], note: Any) -> None:
    async def work() -> list[str]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=300) as client:

            async def read(number: int) -> str:
                body = Asked(number, QUESTIONS[0], 60).body(pictures, stream=True)
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    text = ""
                    async for line in answer.aiter_lines():
                        text += line
                        begun.release()
                    return text

            begun = asyncio.Semaphore(0)
            tasks = [asyncio.create_task(read(i)) for i in range(8)]
            for _ in range(40):
                await begun.acquire()
            server.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    texts = asyncio.run(work())
    finished = sum(text.endswith("data: [DONE]") for text in texts)
    code = server.process.wait(120)
    note("S5", "SIGTERM with 8 in flight", "all finish, exit 0", f"{finished} of 8, exit {code}")


def _data_uri(image: Any) -> str:
    kept = io.BytesIO()
    image.save(kept, "PNG")
    return f"data:image/png;base64,{base64.b64encode(kept.getvalue()).decode()}"


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


if __name__ == "__main__":
    main()

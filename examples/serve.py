# SPDX-License-Identifier: Apache-2.0
"""A frozen classifier that answers one image at a time: worker threads, warm-up, latency percentiles, a small server.

    python examples/serve.py                                              # clients in this process, random weights
    python examples/serve.py --workers 2 --threads 1 --clients 8          # more answers a second, each one later
    python examples/serve.py --checkpoint mobilevit_xxs.pth --http 8000   # curl --data-binary @photo.jpg localhost:8000

Several threads may call one frozen model at once. One worker with all cores answers soonest; a worker a core answers
the most. The server listens on this machine alone, and has no more than its lines: put a real one before the world.
"""

import argparse
import io
import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import timm
import torch
from PIL import Image

import mvit_kernels

LARGEST = 20 * 2**20  # bytes of a photo


class Service:
    """A frozen model, the preprocessing of its photos, and `workers` threads that use `threads` cores each."""

    def __init__(self, model, size, dtype, workers, threads, **preprocessing):
        torch.set_num_threads(threads)  # of each thread that calls the model
        config = timm.data.resolve_model_data_config(model) | {"input_size": (3, size, size)} | preprocessing
        self.transform = timm.data.create_transform(**config, is_training=False)
        self.model = mvit_kernels.freeze(mvit_kernels.accelerate(model.eval()), dtype=dtype)
        self.pool = ThreadPoolExecutor(workers)
        started = threading.Barrier(workers)  # the pool starts a thread only when none is idle

        def warm_up(_):
            started.wait()
            return [self._timed(torch.rand(3, size, size)) for _ in range(5)]

        self.warm_up = list(self.pool.map(warm_up, range(workers)))  # seconds of the first answers of each worker

    def _timed(self, image):
        start = time.perf_counter()
        self._answer(image)
        return time.perf_counter() - start

    def _answer(self, image):
        with torch.inference_mode():  # of this thread: such modes are not inherited
            return self.model(image.unsqueeze(0))[0].float().softmax(0)

    def submit(self, image):
        """The future of the probabilities of an image (3, size, size)."""
        return self.pool.submit(self._answer, image)

    def classify(self, photo, count=5):
        """The most probable classes of the photo in `photo`, bytes of a file."""
        image = self.transform(Image.open(io.BytesIO(photo)).convert("RGB"))
        probabilities = self.submit(image).result()
        probabilities, classes = probabilities.topk(min(count, len(probabilities)))
        found = zip(classes.tolist(), probabilities.tolist(), strict=True)
        return [{"class": index, "probability": round(probability, 4)} for index, probability in found]


def load(service, size, clients, requests):
    """Seconds of each answer, and of all: `clients` threads ask, each again when its last answer is there."""
    images = torch.rand(clients, 3, size, size)

    def client(image):
        seconds = []
        for _ in range(requests // clients):
            start = time.perf_counter()
            service.submit(image).result()
            seconds.append(time.perf_counter() - start)
        return seconds

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        answered = [seconds for part in threads.map(client, images) for seconds in part]
    return answered, time.perf_counter() - start


def server(service, port):
    """A server that answers the bytes of a photo, by POST, with JSON. Port 0: any that is free."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                length = int(self.headers.get("Content-Length", 0))
                if not 0 < length <= LARGEST:
                    raise ValueError(f"send a photo of at most {LARGEST} bytes; these are {length}")
                self.reply(200, service.classify(self.rfile.read(length)))
            except (OSError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, of what is no photo
                self.reply(400, {"error": str(error)})

        def reply(self, status, value):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mobilevit_xxs")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights; random ones without")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--mean", type=float, nargs=3, help="of the photos' channels, as in training; timm's without")
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--workers", type=int, default=1, help="images that are worked on at the same time")
    parser.add_argument("--threads", type=int, help="cores of each worker; all, shared among the workers")
    parser.add_argument("--clients", type=int, default=2, help="who ask at the same time")
    parser.add_argument("--requests", type=int, default=200, help="of all clients together")
    parser.add_argument("--http", type=int, metavar="PORT", help="serve photos until Ctrl-C instead")
    args = parser.parse_args()
    if args.requests < 2 * args.clients:
        parser.error("--requests: at least two for each of --clients")
    if min(args.workers, args.clients, args.threads or 1) < 1:
        parser.error("--workers, --clients and --threads: at least one")

    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=args.classes)
    if args.checkpoint:
        mvit_kernels.load_checkpoint(model, args.checkpoint)
    threads = args.threads or max(1, torch.get_num_threads() // args.workers)
    given = {name: getattr(args, name) for name in ("mean", "std") if getattr(args, name)}
    service = Service(model, args.size, getattr(torch, args.dtype), args.workers, threads, **given)
    print(f"{args.model}, {args.size} px, {args.dtype}; workers: {args.workers}, cores of each: {threads}")
    first, last = service.warm_up[0][0], service.warm_up[0][-1]
    print(f"a worker's first answer took {1e3 * first:.1f} ms, its fifth {1e3 * last:.1f} ms")

    if args.http is not None:
        with server(service, args.http) as running:
            print(f"curl --data-binary @photo.jpg localhost:{running.server_port}", flush=True)
            try:
                running.serve_forever()
            except KeyboardInterrupt:
                return
    seconds, total = load(service, args.size, args.clients, args.requests)
    p50, p90, p99 = (1e3 * statistics.quantiles(seconds, n=100, method="inclusive")[p - 1] for p in (50, 90, 99))
    print(f"{len(seconds)} answers to {args.clients} clients: {len(seconds) / total:.0f} a second")
    print(f"latency with waiting: median {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms")


if __name__ == "__main__":
    main()

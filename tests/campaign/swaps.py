"""A model's folder is swapped under load: every image has the bytes of the old weights or of the new ones, never others."""

import contextlib
import json
import os
import shutil
import threading

SEEDS = 4


def cases(world):
    for swaps, clients in [(4, 4), (10, 8), (50, 8)]:
        yield f"{swaps} swaps under {clients} clients", lambda s=swaps, c=clients: swapped(world, s, c)
    yield "a broken folder under load leaves the old weights", lambda: broken(world)
    yield "unloaded and loaded under load", lambda: unloaded(world)


@contextlib.contextmanager
def served(world, swaps_to=None):
    """A server of one model `m`, whose folder may be swapped."""
    models = world.folder_for("models")
    world.variant("m", models=models).rename(models / "m0")
    shutil.copytree(models / "m0", models / "m")
    shutil.rmtree(models / "m0")
    with world.serve(models=models) as server:
        yield server, models / "m"


def versions(world):
    """Two folders of other weights."""
    folder = world.folder_for("versions")
    made = []
    for seed in (1, 2):
        world.train(folder / f"t{seed}", 2, "--seed", seed).worked()
        shutil.rmtree(folder / f"t{seed}/training")
        made.append(folder / f"t{seed}")
    return made


def swap(folder, version):
    """As a deployment does it: a new folder beside, then two renames."""
    fresh, old = folder.with_name(".fresh"), folder.with_name(".old")
    shutil.copytree(version, fresh)
    os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old)


def load(server, seconds=60):
    return server.post("/v2/repository/models/m/load", seconds=seconds)


def reference(server):
    images = {}
    for seed in range(SEEDS):
        reply = server.image("m", seed, steps=10)
        assert reply.status == 200, reply.text()
        images[seed] = reply.body
    return images


class Clients:
    """Ask for images until the block ends, and say what they had."""

    def __init__(self, server, count):
        self.server, self.had, self.problems = server, set(), []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(index,)) for index in range(count)]

    def ask(self, index):
        while not self.stop.is_set():
            seed = index % SEEDS
            index += 1
            try:
                reply = self.server.image("m", seed, steps=10, seconds=60)
            except OSError as problem:
                self.problems.append(repr(problem))
                continue
            if reply.status == 200:
                self.had.add((seed, reply.body))
            else:
                self.problems.append(f"{reply.status} {reply.text()}")

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()


def swapped(world, swaps, clients):
    made = versions(world)
    with served(world) as (server, folder):
        references = []
        for version in made:
            swap(folder, version)
            assert load(server).status == 200
            references.append(reference(server))
        assert references[0] != references[1], "two versions with one picture"
        with Clients(server, clients) as asked:
            for index in range(swaps):
                swap(folder, made[index % 2])
                reply = load(server)
                assert reply.status == 200, reply.text()
                # Who asks after the answer has the new weights.
                assert server.image("m", 0, steps=10, seconds=60).body == references[index % 2][0], "the old weights after a load"
        assert not asked.problems, asked.problems[:3]
        allowed = {(seed, images[seed]) for images in references for seed in range(SEEDS)}
        assert asked.had and asked.had <= allowed, f"{len(asked.had - allowed)} images are of neither"
        server.lives()


def broken(world):
    with served(world) as (server, folder):
        images = reference(server)
        with Clients(server, 4) as asked:
            config = folder / "unet/config.json"
            good = config.read_text()
            wrong = [json.dumps(json.loads(good) | {"block_out_channels": widths}) for widths in ([8, 12], [0, 8])]
            for content in ["", "{}", *wrong]:
                config.write_text(content)
                reply = load(server)
                assert reply.status in (400, 409, 503), f"{content}: {reply.status} {reply.text()}"
            config.write_text(good)
            assert load(server).status == 200
        assert not asked.problems, asked.problems[:3]
        assert asked.had <= set(images.items()), "other images than the old weights'"


def unloaded(world):
    with served(world) as (server, _):
        images = reference(server)
        with Clients(server, 4) as asked:
            for _ in range(5):
                assert server.post("/v2/repository/models/m/unload", seconds=60).status == 200
                assert load(server).status == 200
        other = [problem for problem in asked.problems if not problem.startswith(("404", "503"))]
        assert not other, other[:3]
        assert asked.had <= set(images.items()), "other images"
        server.lives()

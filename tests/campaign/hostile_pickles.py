"""Checkpoints of PyTorch that were made to harm: a pickle in an archive, or alone. No code in one is ever run."""

import io
import json
import struct
import zipfile

# Names that a state dict has, and one that it has not.
ORDERED = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOAT = b"ctorch\nFloatStorage\n"


def cases(world):
    mark = world.folder / "was-run"
    for name, pickle in pickles(mark).items():
        for kind, wrap in [("zip", archive), ("legacy", legacy), ("bare", bytes)]:
            def check(pickle=pickle, wrap=wrap):
                path = world.folder_for("pickle") / "x.pt"
                path.write_bytes(wrap(pickle))
                ended = world.run("import", path, "--arch", world.arch, "--out", path.parent / "new")
                assert not mark.exists(), "code in a pickle was run"
                ended.refused("x.pt")
                assert not (path.parent / "new").exists(), "half a model is left"
            yield f"pickle, {kind}: {name}", check
    for field, value in [(field, value) for field in ["image_size", "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "num_heads"] for value in [0, -1, 1, 2**31, 2**63, 1e308, None, "x", "1,0", []]]:
        def check(field=field, value=value):
            path = world.folder_for("arch")
            (path / "x.pt").write_bytes(archive(b"\x80\x02}."))
            (path / "flags.json").write_text(json.dumps(json.loads(world.arch.read_text()) | {field: value}))
            world.run("import", path / "x.pt", "--arch", path / "flags.json", "--out", path / "new").refused(["flags.json", "x.pt"])
        yield f"import --arch: {field} {value!r}", check


def pickles(mark):
    run = f"touch {mark}".encode()
    item = b"}X\x01\x00\x00\x00a"
    return {
        "empty": b"",
        "an end alone": b"\x80\x02.",
        "an empty tuple": b"\x80\x02).",
        "none": b"\x80\x02N.",
        "no end": b"\x80\x02}",
        "an unknown opcode": b"\x80\x02\xfe.",
        "a protocol of 255": b"\x80\xff}.",
        "half a million lists": b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
        "half a million tuples": b"\x80\x02)" + b"\x85" * 500_000 + b".",
        "half a million marks": b"\x80\x02" + b"(" * 500_000 + b".",
        "half a million dictionaries": b"\x80\x02" + b"}K\x00" * 500_000 + b"}" + b"s" * 500_000 + b".",
        "a string of 4 GB": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.",
        "a string of 2^63": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.",
        "bytes of 2^63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.",
        "a frame of 2^63": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}.",
        "a number of 2^31 bytes": b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"x.",
        "a negative length": b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
        "a place in the memo of 2^32": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
        "nothing at its place in the memo": b"\x80\x02j" + struct.pack("<I", 7) + b".",
        "a stack that is empty": b"\x80\x02a.",
        "text without an end": b"\x80\x02V" + b"x" * (8 << 20),
        "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
        "a billion laughs": b"\x80\x02](" + b"".join(b"]q" + bytes([n]) + (b"h" + bytes([n - 1])) * 0 for n in range(1, 100)) + b"e.",
        "doubling": b"\x80\x02)q\x00" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60)) + b".",
        "a command by reduce": b"\x80\x02cos\nsystem\n(X" + struct.pack("<I", len(run)) + run + b"tR.",
        "a command by name": b"(S'" + run + b"'\nios\nsystem\n.",
        "a command by protocol 4": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(run) % 256]) + run + b"\x85R.",
        "a command by build": b"\x80\x02cbuiltins\nexec\n(X" + struct.pack("<I", len(run)) + run + b"t\x81.",
        "a class of its own": b"\x80\x02cmy.module\nModel\n)\x81}b.",
        "a tensor without storage": b"\x80\x02" + item + REBUILD + b"((K\x00(t(tI00\n" + ORDERED + b")RtRs.",
        "a tensor of 2^62": tensor(2**62, [2**62], [1]),
        "a shape that overflows": tensor(4, [2**40, 2**40], [1, 1]),
        "a negative shape": tensor(4, [-4], [1]),
        "steps of 2^40": tensor(4, [2, 2], [2**40, 1]),
        "negative steps": tensor(4, [2, 2], [-1, 1]),
        "an offset of 2^40": tensor(4, [4], [1], offset=2**40),
        "a storage outside": tensor(4, [4], [1], key="../../../etc/passwd"),
        "a name of 1 MiB": tensor(4, [4], [1], name="x" * (1 << 20)),
        "an unknown type": tensor(4, [4], [1], kind=b"ctorch\nQuantisedStorage\n"),
    }


def whole(number):
    """Any integer: LONG1."""
    content = number.to_bytes((number.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(numel, shape, strides, offset=0, key="0", name="a", kind=FLOAT):
    """A state dict of one tensor, as torch.save writes it."""
    storage = b"(" + text("storage") + kind + text(key) + text("cpu") + whole(numel) + b"tQ"
    sides = lambda values: b"(" + b"".join(map(whole, values)) + b"t"  # noqa: E731
    arguments = b"(" + storage + whole(offset) + sides(shape) + sides(strides) + b"\x89" + ORDERED + b")Rt"
    return b"\x80\x02}" + text(name) + REBUILD + arguments + b"Rs."


def archive(pickle):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data.pkl", pickle)
        file.writestr("archive/data/0", bytes(16))
        file.writestr("archive/version", "3\n")
    return content.getvalue()


def legacy(pickle):
    """Before PyTorch 1.6: a magic number, a protocol, the machine, then the object."""
    return b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}." + pickle + b"\x80\x02].".ljust(32, b"\0")

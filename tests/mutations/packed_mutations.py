"""Mutations of model.slope, what a run stores and sends: its tensors, its header, its bytes; and of a file alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import zstandard
from checkpoint_mutations import damaged, deleted
from graph_mutations import no_bias, without
from mutation import Corrupt, Mutation, Subject
from onnx_edits import MODEL, edited, with_weight
from packed_edits import PACKED, Content, Opened, repacked, resigned, retold
from weight_kinds import CORE, WEIGHT_KINDS, Coded, WeightKind

from slope_compile.pack.read import open_packed
from slope_compile.pack.write import pack_onnx

CHECK, ARTIFACT, ALONE = "packed", "packed file", "packed file alone"
CONV, BIAS, VARIANCE, COUNT = "conv.weight", "again.bias", "norm.running_var", "norm.num_batches_tracked"
NEGATIVE = next(one for one in CORE if one.kind == "one scale negative")
Edit = Callable[[Content], object]


def _row(kind: str, corrupt: Corrupt) -> Mutation:
    return Mutation(kind, ARTIFACT, corrupt, frozenset({CHECK}))


def _weight(one: WeightKind) -> Edit:
    def edit(content: Content) -> None:
        before = content.codes[one.layer]
        after = one.change(Coded(before.codes, before.scale))
        content.codes[one.layer] = replace(before, codes=after.codes, scale=after.scale)

    return edit


def _declared(**given: Any) -> Edit:
    return lambda content: content.codes.update({CONV: replace(content.codes[CONV], **given)})


def _out_of_range(content: Content) -> None:
    codes = content.codes[CONV].codes.copy()
    codes[tuple(np.argwhere(codes)[0])] = 8
    content.codes[CONV] = replace(content.codes[CONV], codes=codes)


def _exchanged(content: Content) -> None:
    one, other = content.codes[CONV], content.codes["again.weight"]
    content.codes.update({CONV: other, "again.weight": one})


def _renamed(content: Content) -> None:
    content.codes["convs.weight"] = content.codes.pop(CONV)


def _values(name: str, change: Callable[[Any], Any]) -> Edit:
    def edit(content: Content) -> None:
        dtype, values = content.tensors[name]
        content.tensors[name] = dtype, np.asarray(change(values.copy()), values.dtype)

    return edit


def _norms_exchanged(content: Content) -> None:
    held = content.tensors
    held["norm.weight"], held["norm.bias"] = held["norm.bias"], held["norm.weight"]


def _latent(content: Content) -> None:
    weight = content.codes[CONV].dequantize().astype(np.float32)
    content.tensors["conv.parametrizations.weight.original"] = "F32", weight


def _as_float(content: Content) -> None:
    content.tensors[CONV] = "F32", content.codes.pop(CONV).dequantize().astype(np.float32)


def _as_half(content: Content) -> None:
    content.tensors[BIAS] = "F16", content.tensors[BIAS][1].astype(np.float16)


TENSORS = (
    [_row(one.kind, repacked(_weight(one))) for one in WEIGHT_KINDS if one.kind not in ("one scale denormal",)]
    + [
        _row("a code out of its bits' range", repacked(_out_of_range)),
        _row("more bits declared", repacked(_declared(bits=8))),
        _row("fewer bits declared", repacked(_declared(bits=3))),
        _row("another axis declared", repacked(_declared(axis=1))),
        _row("no pattern declared", repacked(_declared(pattern=None))),
        _row("a weaker pattern declared", repacked(_declared(pattern=(3, 4)))),
        _row("a pattern that does not hold declared", repacked(_declared(pattern=(1, 4)))),
        _row("a layer missing", repacked(lambda content: content.codes.pop(CONV))),
        _row("a layer more", repacked(lambda content: content.codes.update(more=content.codes[CONV]))),
        _row("a layer renamed", repacked(_renamed)),
        _row("two layers exchanged", repacked(_exchanged)),
        _row("a layer as float32 values", repacked(_as_float)),
        _row("one bias off by its last bit", repacked(_values(BIAS, lambda v: np.nextafter(v, np.float32(9))))),
        _row("bias negated", repacked(_values(BIAS, np.negative))),
        _row("a bias NaN", repacked(_values(BIAS, lambda values: values * np.float32(np.nan)))),
        _row("biases rounded to float16", repacked(_as_half)),
        _row("one running variance edited", repacked(_values(VARIANCE, lambda v: v * np.float32(1.01)))),
        _row("running variance negative", repacked(_values(VARIANCE, np.negative))),
        _row("a count of batches edited", repacked(_values(COUNT, lambda count: count + 1))),
        _row("norm's gain and offset exchanged", repacked(_norms_exchanged)),
        _row("a float tensor missing", repacked(lambda content: content.tensors.pop(BIAS))),
        _row("a float tensor more", repacked(lambda content: content.tensors.update(more=content.tensors[BIAS]))),
        _row("a latent weight packed too", repacked(_latent)),
    ]
)  # fmt: skip


def _entry(of: str, /, **given: Any) -> Callable[[Opened], object]:
    return lambda opened: opened.entry(of).update(given)


def _inside(name: str, part: str, **given: Any) -> Callable[[Opened], object]:
    return lambda opened: opened.entry(name)[part].update(given)


def _sections_exchanged(opened: Opened) -> None:
    """Two biases of one length: the digests stay with their sections, the tensors get each other's."""
    one, other = opened.entry("again.bias"), opened.entry("stem.0.bias")
    one["section"], other["section"] = other["section"], one["section"]


def _bytes_exchanged(opened: Opened) -> None:
    """The same, by the bytes."""
    one, other = opened.entry("mix.bias")["section"], opened.entry("mixed.bias")["section"]
    opened.sections[one], opened.sections[other] = opened.sections[other], opened.sections[one]


def _byte_of(name: str) -> Callable[[Opened], object]:
    """The lowest bit of the last byte that is stored of a tensor."""

    def edit(opened: Opened) -> None:
        index = opened.entry(name)["section"]
        data = opened.sections[index]
        opened.sections[index] = data[:-1] + bytes([data[-1] ^ 1])

    return edit


def _first_stream(name: str, part: str, change: Callable[[list[int]], list[int]]) -> Callable[[Opened], object]:
    def edit(opened: Opened) -> None:
        streams = opened.entry(name)[part]["streams"]
        streams[0] = change(streams[0])

    return edit


def _stored_as_zstd(opened: Opened) -> None:
    """Bytes that are stored as they are, under a number that means a zstd frame."""
    entry = opened.entry(BIAS)
    index, raw = entry["section"], entry["numbers"]["streams"][0][1]
    opened.sections[index] = opened.sections[index][: raw - 1]
    entry["numbers"].update(planes=1, streams=[[raw - 1, raw]])


def _bomb(size: int, said: int) -> Callable[[Opened], object]:
    """A frame of zeros in place of a bias, and how many bytes the header says it holds."""

    def edit(opened: Opened) -> None:
        frame = zstandard.compress(bytes(size))
        entry = opened.entry(BIAS)
        opened.sections[entry["section"]] = frame
        entry["numbers"].update(planes=1, streams=[[len(frame), said]])

    return edit


def _one_section_more(opened: Opened) -> None:
    opened.header["sections"].append({"stored": 0, "sha256": ""})
    opened.sections.append(b"nobody asked")


def _last_section_gone(opened: Opened) -> None:
    opened.header["sections"].pop()
    opened.sections.pop()


def _twice(opened: Opened) -> None:
    opened.header["coded"].append(opened.header["coded"][-1])


def _unsorted(opened: Opened) -> None:
    opened.header["tensors"].reverse()


def _padded(opened: Opened) -> None:
    """Bytes behind the runs of a section, signed."""
    opened.sections[opened.entry(BIAS)["section"]] += b"more"


HEADER = [
    _row("sections of two tensors exchanged in the header", resigned(_sections_exchanged)),
    _row("sections of two tensors exchanged", resigned(_bytes_exchanged)),
    _row("a stored bit of a float tensor flipped", resigned(_byte_of(BIAS))),
    _row("a stored bit of a coded tensor flipped", resigned(_byte_of(CONV))),
    _row("element type declared otherwise", resigned(_entry(BIAS, dtype="I32"))),
    _row("an element type that nobody has", resigned(_entry(BIAS, dtype="F33"))),
    _row("shape of codes declared otherwise", resigned(_entry(CONV, shape=[16, 16, 9, 1]))),
    _row("a shape that the runs do not fill", resigned(_entry(CONV, shape=[16, 16, 3, 4]))),
    _row("a shape of 2^60 elements", resigned(_entry(CONV, shape=[2**30, 2**30]))),
    _row("a negative extent", resigned(_entry(CONV, shape=[-16, 16, 3, 3]))),
    _row("an axis that codes do not have", resigned(_entry(CONV, axis=4))),
    _row("bits declared 0", resigned(_entry(CONV, bits=0))),
    _row("a pattern that is none", resigned(_entry(CONV, pattern="2:0"))),
    _row("codes from another value on", resigned(_inside(CONV, "codes", low=-8, high=6))),
    _row("a wider range of codes", resigned(_inside(CONV, "codes", high=8))),
    _row("codes without groups", resigned(_inside(CONV, "codes", groups=None))),
    _row("groups around another value", resigned(lambda o: o.entry(CONV)["codes"]["groups"].update(zero=1))),
    _row("groups along another axis", resigned(lambda o: o.entry(CONV)["codes"]["groups"].update(axis=0))),
    _row("one value fewer in the groups", resigned(lambda o: o.entry(CONV)["codes"]["groups"].update(nonzeros=1))),
    _row("a run declared stored as it is", resigned(_first_stream(CONV, "codes", lambda run: [run[1], run[1]]))),
    _row("a run declared a zstd frame", resigned(_stored_as_zstd)),
    _row("a run of 2^40 bytes declared", resigned(_first_stream(BIAS, "numbers", lambda run: [run[0], 2**40]))),
    _row("a frame that holds more than is declared", resigned(_bomb(2**17, 64))),
    _row("a frame of 64 MiB for a bias", resigned(_bomb(2**26, 2**26))),
    _row("a section that nothing is in", resigned(_one_section_more)),
    _row("the last section gone", resigned(_last_section_gone)),
    _row("bytes behind a section's runs", resigned(_padded)),
    _row("a section that is not there", resigned(_entry(BIAS, section=9999))),
    _row("a coded tensor twice", resigned(_twice)),
    _row("tensors in another order", resigned(_unsorted)),
    _row("a name of 1001 letters", resigned(_entry(CONV, name="c" * 1001))),
    _row("ONNX declared", resigned(lambda opened: opened.header.update(content="onnx"))),
    _row("a content that nobody has", resigned(lambda opened: opened.header.update(content="gguf"))),
    _row("an unknown key in the header", resigned(lambda opened: opened.header.update(code="import os"))),
    _row("a key of the header missing", resigned(lambda opened: opened.header.pop("files"))),
    _row("a number as text", resigned(_entry(CONV, bits="4"))),
    _row("header that is no JSON", retold(lambda text: b"{")),
    _row("header a list", retold(lambda text: b"[]")),
    _row("a key of the header twice", retold(lambda text: text[:-1] + b',"files":[]}')),
    _row("spaces in the header", retold(lambda text: text.replace(b":", b": ", 1))),
    _row("header nested 100000 deep", retold(lambda text: b"[" * 100000)),
    _row("header that is no text", retold(lambda text: b"\xff" + text[1:])),
    _row("a later format", resigned(lambda opened: None, version=2)),
]  # fmt: skip


def _at(place: int, change: Callable[[int], int] = lambda byte: byte ^ 1) -> Callable[[bytes], bytes]:
    """Change one byte; a negative place is counted from the end."""

    def changed(data: bytes) -> bytes:
        at = place % len(data)
        return data[:at] + bytes([change(data[at])]) + data[at + 1 :]

    return changed


def _from_run(run: str, file: str) -> Corrupt:
    return lambda subject: (shutil.copy(subject.runs[run] / file, subject.file(PACKED)), None)[1]


def _instead(make: Callable[[Any], object]) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        path = subject.file(PACKED)
        path.unlink()
        make(path)

    return corrupt


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "another beginning": _at(1),
    "format 2, not signed": _at(8, lambda _: 2),
    "a header longer than the file": _at(15, lambda _: 255),
    "a header of 4 GiB unpacked": _at(19, lambda _: 255),
    "a bit of the header's digest flipped": _at(20),
    "a bit of the header flipped": _at(60),
    "the last bit flipped": _at(-1),
    "a bit in the middle flipped": lambda data: _at(len(data) // 2)(data),
    "last byte cut off": lambda data: data[:-1],
    "second half cut off": lambda data: data[: len(data) // 2],
    "cut off within the header": lambda data: data[:100],
    "only its first 10 bytes": lambda data: data[:10],
    "bytes behind its end": lambda data: data + b"more",
    "one byte put before the first": lambda data: b"x" + data,
    "twice in one": lambda data: data + data,
    "zeros of the same length": lambda data: bytes(len(data)),
    "empty": lambda data: b"",
    "a text of its name": lambda data: b"a packed file\n",
    "a pickle of its name": lambda data: b"\x80\x04N.",
}
NO_PACKED_FILE = {
    kind for kind, change in DAMAGE.items() if change(b"\x89SLOPE\r\n" + bytes(100))[:8] != b"\x89SLOPE\r\n"
}
FILE = [_row(kind, damaged(PACKED, change)) for kind, change in DAMAGE.items()] + [
    _row("the ONNX file in its place", _from_run("float", "export/model.onnx")),
    _row("the codes in its place", _from_run("float", "train/codes.safetensors")),
    _row("the packed ONNX file in its place", _from_run("packed onnx", PACKED)),
    _row("another run's", _from_run("other", PACKED)),
    _row("that of a run with quantized activations", _from_run("int8", PACKED)),
    _row("deleted", deleted(PACKED)),
    _row("a folder of its name", _instead(lambda path: path.mkdir())),
    _row("a pipe of its name", _instead(os.mkfifo)),
]  # fmt: skip
PACKED_FILE = [*TENSORS, *HEADER, *FILE]


LATER = {"a later format", "format 2, not signed"}


def _alone(kind: str, corrupt: Corrupt, *by: str, subject: str = "packed", missed: str = "") -> Mutation:
    if kind in LATER:  # refused: by its own laws, which are not known here, it may be in order
        return Mutation(kind, ALONE, corrupt, frozenset(), subject, 2, "this version reads 1", naive=False)
    checks = frozenset() if missed else frozenset(by or {CHECK})
    return Mutation(kind, ALONE, corrupt, checks, subject, missed=missed, naive=False)


NOTHING_BESIDE = "signed anew it is a packed file like any other; in a run, `packed` compares it with the checkpoint"
# Other numbers, which obey the laws: the last two rows of PACKED_ALONE stand for them all.
LAWFUL = {
    "sections of two tensors exchanged", "a stored bit of a float tensor flipped", "codes from another value on",
    "a stored bit of a coded tensor flipped", "element type declared otherwise", "shape of codes declared otherwise",
}  # fmt: skip
LAWLESS = {one.kind: repacked(_weight(one)) for one in WEIGHT_KINDS if one.lawless and "transposed" not in one.kind} | {
    "a code out of its bits' range": repacked(_out_of_range),
    "fewer bits declared": repacked(_declared(bits=3)),
    "a pattern that does not hold declared": repacked(_declared(pattern=(1, 4))),
    "a bias NaN": repacked(_values(BIAS, lambda values: values * np.float32(np.nan))),
    "running variance negative": repacked(_values(VARIANCE, np.negative)),
}


def _packed_again(change: Corrupt) -> Corrupt:
    """Restore a packed ONNX file, corrupt the model, and pack it as `pack` does."""

    def corrupt(subject: Subject) -> None:
        path, work = subject.file(PACKED), subject.file("work")
        (work / "export").mkdir(parents=True)
        open_packed(path).restore(work / "export")
        change(Subject(work, subject.runs))
        pack_onnx(work / MODEL, path)

    return corrupt


def _file(**given: Any) -> Corrupt:
    return resigned(lambda opened: opened.header["files"][0].update(given))


def _gap_moved(opened: Opened) -> None:
    gaps = opened.header["files"][0]["gaps"]
    gaps[0], gaps[1] = gaps[0] - 1, gaps[1] + 1


ONNX = {
    "model.onnx: one scale negative": (_packed_again(edited(MODEL, with_weight(NEGATIVE))), "pattern", "codes"),
    "model.onnx: bias dropped": (_packed_again(edited(MODEL, no_bias)), "parity.onnx"),
    "model.onnx: a Relu removed": (_packed_again(edited(MODEL, without("Relu", 1))), "parity.onnx"),
    "model.onnx: a stored bit of codes flipped": (resigned(_byte_of("conv.weight.codes")), CHECK),
    "model.onnx: another sha256": (_file(sha256="0" * 64), CHECK),
    "model.onnx: another size": (_file(size=1), CHECK),
    "model.onnx: a tensor one byte further on": (resigned(_gap_moved), CHECK),
    "model.onnx: a name in the folder above": (_file(name="../model.onnx"), CHECK),
    "model.onnx: an absolute name": (_file(name="/tmp/model.onnx"), CHECK),
    "model.onnx: a name of an engine": (_file(name="model.onnx/../../x"), CHECK),
    "model.onnx: no file": (resigned(lambda opened: opened.header.update(files=[])), CHECK),
    "model.onnx: a model declared": (resigned(lambda opened: opened.header.update(content="model")), CHECK),
}
PACKED_ALONE = (
    [_alone(kind, damaged(PACKED, change)) for kind, change in DAMAGE.items() if kind not in NO_PACKED_FILE]
    + [_alone(one.kind, one.corrupt) for one in HEADER if one.kind not in LAWFUL]
    + [_alone(kind, corrupt) for kind, corrupt in LAWLESS.items()]
    + [_alone(kind, corrupt, *by, subject="packed onnx") for kind, (corrupt, *by) in ONNX.items()]
    + [
        _alone("lowest bit of one code flipped", TENSORS[0].corrupt, missed=NOTHING_BESIDE),
        _alone("another run's", _from_run("other", PACKED), missed=NOTHING_BESIDE),
    ]
)

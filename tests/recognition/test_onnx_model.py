"""Anybody's ONNX file as a model: the input as it is asked for, and files that are none, do not fit, or are hostile."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lib.errors import UserError
from lib.faces.alignment import ARCFACE, EYES
from lib.recognition.embedder import extraction_settings, load_embedder
from lib.recognition.onnx_model import METADATA_KEY, OnnxInput, OnnxModel


def onnx_file(
    path: Path,
    *,
    shape: tuple[int | str, ...] = ("n", 3, 32, 32),
    inputs: int = 1,
    metadata: dict[str, str] | None = None,
    external: bool = False,
    number: int = TensorProto.FLOAT,
) -> str:
    """Write a model whose vector holds the sums over each row of each channel, in the order that it gets them."""
    axis = len(shape) - 1
    axes = numpy_helper.from_array(np.array([axis], np.int64), "axes")
    flat = numpy_helper.from_array(np.array([0, -1], np.int64), "flat")
    nodes = [
        helper.make_node("Cast", ["faces"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["floats", "axes"], ["sums"], keepdims=0),
        helper.make_node("Reshape", ["sums", "flat"], ["vector"]),
    ]
    taken = [helper.make_tensor_value_info("faces", number, shape)]
    taken += [helper.make_tensor_value_info(f"more{n}", TensorProto.FLOAT, [1]) for n in range(inputs - 1)]
    given = [helper.make_tensor_value_info("vector", TensorProto.FLOAT, [shape[0], "d"])]
    if external:
        flat.ClearField("raw_data")
        flat.data_location = TensorProto.EXTERNAL
        flat.external_data.add(key="location", value="../../../../../etc/passwd")
    graph = helper.make_graph(nodes, "g", taken, given, [axes, flat])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    path.write_bytes(model.SerializeToString())
    return str(path)


def crops(num: int = 3, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, size, size, 3), np.uint8)


@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("batch", ["n", 1])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_input_is_as_the_flags_say(tmp_path: Path, layout: str, batch: int | str, color: str) -> None:
    shape = (batch, 3, 32, 32) if layout == "nchw" else (batch, 32, 32, 3)
    wanted = OnnxInput(layout=layout, color=color, mean=(1, 2, 3), std=(4, 5, 6), normalize=False)  # type: ignore[arg-type]
    model = OnnxModel(onnx_file(tmp_path / "a é.onnx", shape=shape), wanted)
    pixels = crops().astype(np.float64)
    if color == "bgr":
        pixels = pixels[..., ::-1]
    images = (pixels - [1, 2, 3]) / [4, 5, 6]
    expected = images.transpose(0, 3, 1, 2).sum(axis=3) if layout == "nchw" else images.sum(axis=3)
    np.testing.assert_allclose(model.embed(crops()), expected.reshape(3, -1), rtol=1e-4, atol=1e-2)
    assert model.embedding_dim == expected[0].size


def test_vectors_have_length_1_unless_told_otherwise(tmp_path: Path) -> None:
    model = OnnxModel(onnx_file(tmp_path / "a.onnx"), OnnxInput())
    np.testing.assert_allclose(np.linalg.norm(model.embed(crops(size=64)), axis=1), 1, rtol=1e-5)


def test_its_faces_are_aligned_by_the_five_points_unless_told_otherwise(tmp_path: Path) -> None:
    url = onnx_file(tmp_path / "a.onnx")
    public = load_embedder(url)
    assert public.template == ARCFACE
    assert extraction_settings(public).alignment.template == ARCFACE
    assert extraction_settings(public).alignment.image_size == 112
    ours = load_embedder(url, OnnxInput(alignment="faces"))
    assert ours.template == extraction_settings(ours).alignment.template == EYES


def test_another_input_is_another_model(tmp_path: Path) -> None:
    url = onnx_file(tmp_path / "a.onnx")
    digests = {OnnxModel(url, wanted).digest for wanted in (OnnxInput(), OnnxInput(color="bgr"), OnnxInput())}
    assert len(digests) == 2


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x80\x04 no model")
    with pytest.raises(UserError, match=r"a\.onnx' is no ONNX model"):
        load_embedder(str(tmp_path / "a.onnx"))
    (tmp_path / "b.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="is no ONNX model"):
        load_embedder(str(tmp_path / "b.onnx"))
    whole = Path(onnx_file(tmp_path / "c.onnx")).read_bytes()
    (tmp_path / "c.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is no ONNX model"):
        load_embedder(str(tmp_path / "c.onnx"))
    with pytest.raises(UserError, match=r"nowhere\.onnx"):
        load_embedder(str(tmp_path / "nowhere.onnx"))


def test_data_outside_of_the_file_is_never_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keeps data in other files \(flat\), which are never read"):
        load_embedder(onnx_file(tmp_path / "a.onnx", external=True))


def test_operators_of_someone_else_are_not_run(tmp_path: Path) -> None:
    model = onnx.load(onnx_file(tmp_path / "a.onnx"))
    model.graph.node[0].domain = "evil.ops"
    model.opset_import.append(helper.make_opsetid("evil.ops", 1))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"is no ONNX model that ONNX Runtime can run.*the standard operators alone"):
        load_embedder(str(tmp_path / "a.onnx"))


def test_an_opset_that_is_too_new_is_told(tmp_path: Path) -> None:
    model = onnx.load(onnx_file(tmp_path / "a.onnx"))
    model.opset_import[0].version = 99
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match="save it for an older opset"):
        load_embedder(str(tmp_path / "a.onnx"))


@pytest.mark.parametrize(
    ("shape", "inputs", "wanted", "said"),
    [
        (("n", 3, 32, 32), 1, OnnxInput(layout="nhwc"), "give --layout nchw"),
        (
            ("n", 3, 32, 32),
            1,
            OnnxInput(input_size=64),
            "not squares of 64 pixels.*correct --input-size to 32, or leave it out",
        ),
        (("n", 3, 32, 48), 1, OnnxInput(), "a model that takes squares is needed"),
        (("n", 1, 32, 32), 1, OnnxInput(), "does not take faces of shape.*three colours is needed, not 1"),
        (("n", 3, 32), 1, OnnxInput(), "a picture, in four axes"),
        (("n", 3, 32, 32), 2, OnnxInput(), "the picture as its only input"),
    ],
)
def test_an_input_that_does_not_fit_is_told(
    tmp_path: Path, shape: tuple[int | str, ...], inputs: int, wanted: OnnxInput, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        OnnxModel(onnx_file(tmp_path / "a.onnx", shape=shape, inputs=inputs), wanted)


def test_whole_numbers_as_input_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tensor\(uint8\): export it with an input of float32"):
        load_embedder(onnx_file(tmp_path / "a.onnx", number=TensorProto.UINT8))


@pytest.mark.parametrize("number", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_numbers_of_another_precision_are_given_as_asked_for(tmp_path: Path, number: int) -> None:
    single = OnnxModel(onnx_file(tmp_path / "a.onnx"), OnnxInput())
    other = OnnxModel(onnx_file(tmp_path / "b.onnx", number=number), OnnxInput())
    np.testing.assert_allclose(other.embed(crops()), single.embed(crops()), atol=2e-3)


def test_a_model_that_gives_nothing_is_told(tmp_path: Path) -> None:
    model = onnx.load(onnx_file(tmp_path / "a.onnx"))
    del model.graph.output[:]
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"a\.onnx"):
        load_embedder(str(tmp_path / "a.onnx"))


def test_damaged_files_end_in_a_users_error_or_work(tmp_path: Path) -> None:
    whole = Path(onnx_file(tmp_path / "a.onnx")).read_bytes()
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        (tmp_path / "a.onnx").write_bytes(damaged)
        try:
            load_embedder(str(tmp_path / "a.onnx")).embed(crops())
        except UserError:
            num_refused += 1
    assert num_refused > 50


def test_where_onnx_runtime_knows_no_gpu_a_model_runs_on_the_cpu_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    url = onnx_file(tmp_path / "a.onnx")
    on_cpu = OnnxModel(url, OnnxInput()).embed(crops())
    caplog.clear()
    np.testing.assert_array_equal(OnnxModel(url, OnnxInput(), device="cuda").embed(crops()), on_cpu)
    assert "runs on the CPU: this ONNX Runtime has no GPU support" in caplog.text


def own_file(path: Path, **changes: object) -> str:
    """Write a file that says it is one of this project."""
    about = {"image_size": 32, "fingerprint": {}, "threshold": 0.5, "digest": "0" * 16, **changes}
    metadata = {METADATA_KEY: json.dumps(about)}
    return onnx_file(path, shape=("n", 32, 32, 3), number=TensorProto.UINT8, metadata=metadata)


def test_a_file_of_this_project_says_what_it_wants(tmp_path: Path) -> None:
    model = load_embedder(own_file(tmp_path / "a.onnx"))
    assert (model.threshold, model.digest, model.template) == (0.5, "0" * 16, EYES)
    expected_ND = crops(size=32).astype(float).sum(axis=3).reshape(3, -1)
    np.testing.assert_allclose(model.embed(crops()), expected_ND)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"image_size": 32}), json.dumps({"image_size": "32"})])
def test_damaged_metadata_is_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"metadata of .* is damaged"):
        load_embedder(onnx_file(tmp_path / "a.onnx", metadata={METADATA_KEY: text}))


@pytest.mark.parametrize(
    "wrong",
    [{"image_size": 10**9}, {"image_size": -3}, {"threshold": float("nan")}, {"digest": 7}, {"fingerprint": []}],
)
def test_metadata_out_of_range_are_damaged(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match=r"metadata of .* is damaged"):
        load_embedder(own_file(tmp_path / "a.onnx", **wrong))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"image_size": "x"}, "a fingerprint has values of the wrong type"),
        ({"min_score": None}, "a fingerprint has values of the wrong type"),
        ({"detector": []}, "allowed are"),
        ({"template": "other"}, "allowed are"),
        ({"margin": float("nan")}, "allowed are"),
    ],
)
def test_a_fingerprint_out_of_range_is_told(tmp_path: Path, wrong: dict, said: str) -> None:
    model = load_embedder(own_file(tmp_path / "a.onnx", fingerprint=wrong))
    with pytest.raises(UserError, match=said):
        extraction_settings(model)


@pytest.mark.parametrize("wrong", [{"std": (1.0, 0.0, 1.0)}, {"input_size": 3}])
def test_flags_that_cannot_be_are_told(wrong: dict) -> None:
    with pytest.raises(UserError, match="allowed"):
        OnnxInput(**wrong)


def foreign_file(path: Path, nodes: list, *, outputs: tuple[str, ...] = ("vector",), batch: int | str = "n") -> str:
    """Write a model of these operators, which end in `floats`, and then the mean of each row of each channel."""
    flat = numpy_helper.from_array(np.array([0, -1], np.int64), "flat")
    rest = [
        helper.make_node("ReduceMean", ["floats"], ["means"], axes=[3], keepdims=0),
        helper.make_node("Reshape", ["means", "flat"], ["vector"]),
        helper.make_node("ReduceL2", ["vector"], ["norm"], axes=[1], keepdims=1),
        helper.make_node("Identity", ["means"], ["map"]),
        helper.make_node("ReduceMax", ["vector"], ["score"], axes=[1], keepdims=0),
        helper.make_node("Pad", ["vector", "wider"], ["logits"]),
    ]
    wider = numpy_helper.from_array(np.array([0, 0, 0, 904], np.int64), "wider")
    half = numpy_helper.from_array(np.float32(0.5), "half")
    large = numpy_helper.from_array(np.array([30_000, 30_000], np.int64), "large")
    taken = [helper.make_tensor_value_info("faces", TensorProto.FLOAT, (batch, 3, 32, 32))]
    dims = {"vector": [96], "norm": [1], "score": [], "map": [3, 32], "logits": [1000], "made": [None]}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *dims[name]]) for name in outputs]
    graph = helper.make_graph([*nodes, *rest], "g", taken, given, [flat, half, large, wider])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return str(path)


PLAIN = [helper.make_node("Identity", ["faces"], ["floats"])]


@pytest.mark.parametrize("num", [1, 7, 8, 9, 20])
def test_a_fixed_batch_is_filled_and_run_as_often_as_needed(tmp_path: Path, num: int) -> None:
    fixed = OnnxModel(foreign_file(tmp_path / "8.onnx", PLAIN, batch=8), OnnxInput())
    free = OnnxModel(foreign_file(tmp_path / "n.onnx", PLAIN), OnnxInput())
    np.testing.assert_array_equal(fixed.embed(crops(num)), free.embed(crops(num)))


def test_many_faces_are_run_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnnxModel(onnx_file(tmp_path / "a.onnx"), OnnxInput())
    sizes = []
    run = OnnxModel._run

    def counting(self: OnnxModel, images: np.ndarray, names: list[str]) -> list[np.ndarray]:
        sizes.append(len(images))
        return run(self, images, names)

    monkeypatch.setattr(OnnxModel, "_run", counting)
    together = model.embed(crops(20))
    assert sizes == [8, 8, 4]
    np.testing.assert_array_equal(together[9:10], model.embed(crops(20)[9:10]))


def test_the_first_output_is_the_embedding_beside_a_norm(tmp_path: Path) -> None:
    plain = OnnxModel(foreign_file(tmp_path / "a.onnx", PLAIN), OnnxInput())
    for outputs in (("vector", "norm"), ("vector", "norm", "score"), ("vector", "norm", "map")):
        model = OnnxModel(foreign_file(tmp_path / "b.onnx", PLAIN, outputs=outputs), OnnxInput())
        assert model.embedding_dim == 96
        np.testing.assert_array_equal(model.embed(crops()), plain.embed(crops()))


@pytest.mark.parametrize("batch", ["n", 1, 8])
@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        (("norm", "vector"), r"norm \[N, 1\], vector \[N, 96\], and the first, 'norm', is not one vector a face"),
        (("logits", "vector"), r"logits \[N, 1000\], vector \[N, 96\], and 2 of them could be the embedding"),
        (("vector", "logits"), r"vector \[N, 96\], logits \[N, 1000\], and 2 of them could be the embedding"),
        (("vector", "norm", "logits"), "and 2 of them could be the embedding"),
        (("map", "vector"), r"map \[N, 3, 32\], vector \[N, 96\], and the first, 'map', is not one vector a face"),
        (("norm", "map"), "and none of them is one vector a face"),
    ],
)
def test_what_could_be_another_embedding_is_not_guessed(
    tmp_path: Path, outputs: tuple[str, ...], why: str, batch: int | str
) -> None:
    url = foreign_file(tmp_path / "a.onnx", PLAIN, outputs=outputs, batch=batch)
    with pytest.raises(UserError, match=f"{why}: name the right one by --model-output NAME$"):
        OnnxModel(url, OnnxInput())


@pytest.mark.parametrize("outputs", [("norm", "vector"), ("logits", "vector"), ("vector", "logits", "norm")])
def test_the_output_that_is_named_is_taken(tmp_path: Path, outputs: tuple[str, ...]) -> None:
    plain = OnnxModel(foreign_file(tmp_path / "a.onnx", PLAIN), OnnxInput())
    url = foreign_file(tmp_path / "b.onnx", PLAIN, outputs=outputs)
    named = OnnxModel(url, OnnxInput(model_output="vector"))
    np.testing.assert_array_equal(named.embed(crops()), plain.embed(crops()))
    with pytest.raises(UserError, match=rf"has no output 'fc1': name one by --model-output, out of {outputs[0]} \[N,"):
        OnnxModel(url, OnnxInput(model_output="fc1"))


def test_a_named_output_that_is_no_vector_is_told(tmp_path: Path) -> None:
    url = foreign_file(tmp_path / "a.onnx", PLAIN, outputs=("vector", "norm"))
    with pytest.raises(UserError, match=r"shape \[1, 1\] for one face in its output 'norm': one vector per face"):
        OnnxModel(url, OnnxInput(model_output="norm"))


def test_another_output_is_another_model_and_the_first_one_named_is_none(tmp_path: Path) -> None:
    url = foreign_file(tmp_path / "a.onnx", PLAIN, outputs=("vector", "norm"))
    assert OnnxModel(url, OnnxInput(model_output="vector")).digest == OnnxModel(url, OnnxInput()).digest
    url = foreign_file(tmp_path / "b.onnx", PLAIN, outputs=("vector", "logits"))
    named = [OnnxModel(url, OnnxInput(model_output=name)) for name in ("vector", "logits")]
    assert [model.embedding_dim for model in named] == [96, 1000]
    assert named[0].digest != named[1].digest


def test_a_file_that_normalises_its_input_itself_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nodes = [
        helper.make_node("Sub", ["faces", "half"], ["centred"]),
        helper.make_node("Mul", ["centred", "half"], ["floats"]),
    ]
    OnnxModel(foreign_file(tmp_path / "a.onnx", nodes), OnnxInput())
    assert "begins with Sub and Mul of its input" in caplog.text
    assert "--mean 0 0 0 --std 1 1 1" in caplog.text
    caplog.clear()
    OnnxModel(foreign_file(tmp_path / "b.onnx", PLAIN), OnnxInput())
    assert not caplog.text


def test_a_small_file_that_asks_for_gigabytes_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    nodes = [helper.make_node("ConstantOfShape", ["large"], ["made"]), *PLAIN]
    url = foreign_file(tmp_path / "a.onnx", nodes, outputs=("vector", "made"))
    with pytest.raises(UserError, match=r"asks for 3\.6 GB of constants in a file of 0\.0 MB: take a file from"):
        OnnxModel(url, OnnxInput())

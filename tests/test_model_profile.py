import json
import math

import msgspec
import pytest

from profiler.model_profile import (
    DeviceInfo,
    DiskPoint,
    DiskProfile,
    EmbeddingProfile,
    HeadProfile,
    LayerProfile,
    MemoryProfile,
    ModelInfo,
    ModelProfile,
    Spread,
    load_profile,
    save_profile,
)
from runtime.errors import ProfileError


def spread(mean, relative_sd=0.0):
    sd = mean * relative_sd
    return Spread(mean, sd, 5, mean - 2 * sd, mean + 2 * sd)


def make_profile(
    sizes, compute_s, *, disk=1e9, head=0, head_s=0.0, overhead_s=0.0, noise=0.0, fixed=0, min_window=None
):
    """A profile of layers of these bytes and decode seconds; prefill takes ten times as long for 100 tokens."""
    layers = tuple(
        LayerProfile(n_bytes, 0, spread(n_bytes / disk), spread(s, noise), spread(10 * s, noise), spread(0.0))
        for n_bytes, s in zip(sizes, compute_s, strict=True)
    )
    rate = spread(float(disk), noise)
    return ModelProfile(
        schema=2,
        model=ModelInfo("m.gguf", "m", 77, "llama", sum(sizes) + head, len(sizes), False),
        device=DeviceInfo("box", "cpu", 4, 2**33, "6.1"),
        versions={"llama-cpp-python": "0.3.36"},
        disk=DiskProfile(rate, "direct", 2**20, 4, (DiskPoint("direct", 2**20, 4, rate),)),
        layers=layers,
        head=HeadProfile(head, head // 8, spread(head / disk), spread(head_s), spread(head_s), spread(0.0)),
        embedding=EmbeddingProfile(1000, 10, spread(1e-4)),
        prefill_tokens=100,
        overhead_s=spread(overhead_s),
        kv_bytes_per_token=10,
        kv=None,
        memory=MemoryProfile(fixed, 100, 50, 1000, 500, min_window or max(sizes) // 4, 20),
        floor_bytes=fixed + 1520 + (min_window or max(sizes) // 4),
    )


@pytest.fixture
def profile():
    return make_profile([4000, 8000], [0.1, 0.2], head=1600, head_s=0.05, noise=0.1)


def written(tmp_path, profile, change):
    """A profile file with one change made to its JSON."""
    data = json.loads(msgspec.json.encode(profile))
    change(data)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data))
    return path


def test_spread_of_repeats():
    s = Spread.of([1.0, 2.0, 6.0])
    assert (s.mean, s.n, s.minimum, s.maximum) == (3.0, 3, 1.0, 6.0)
    assert s.sd == pytest.approx(math.sqrt(7))  # ((-2)^2 + (-1)^2 + 3^2) / 2
    assert Spread.of([0.1]).sd == 0


def test_save_and_load_give_the_same_profile(tmp_path, profile):
    path = tmp_path / "p.json"
    save_profile(profile, path)
    save_profile(profile, path)
    assert load_profile(path) == profile
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".user")] == ["p.json"]


def test_cannot_save(tmp_path, profile):
    with pytest.raises(ProfileError, match="cannot write"):
        save_profile(profile, tmp_path / "missing" / "p.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ProfileError, match="cannot write"):
        save_profile(profile, tmp_path / "folder")
    assert not list(tmp_path.glob(".folder*"))


def test_missing_file(tmp_path):
    with pytest.raises(ProfileError, match="No such file"):
        load_profile(tmp_path / "none.json")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[1]", b"{}", b'{"schema": NaN}', b'{"schema":"1"}'])
def test_not_a_profile(tmp_path, data):
    path = tmp_path / "p.json"
    path.write_bytes(data)
    with pytest.raises(ProfileError, match="is not a profile") as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_other_schema(tmp_path, profile):
    path = written(tmp_path, profile, lambda d: d.update(schema=1))
    with pytest.raises(ProfileError, match="schema 1"):
        load_profile(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("disk"), "missing required field `disk`"),
        (lambda d: d["layers"][1].pop("io_s"), "io_s"),
        (lambda d: d["layers"].pop(), "2 layers but 1"),
        (lambda d: d["layers"][0].update(bytes=-1), "layers"),
        (lambda d: d["layers"][0].update(bytes=0), "layers"),
        (lambda d: d["layers"][0]["io_s"].update(mean=-0.1), "mean"),
        (lambda d: d["layers"][0]["io_s"].update(mean=math.nan), "malformed|invalid"),
        (lambda d: d["layers"][0]["io_s"].update(mean=9e9), "outside"),
        (lambda d: d["layers"][0]["io_s"].update(n=0), "n"),
        (lambda d: d["disk"].update(mode="mmap"), "mode"),
        (lambda d: d["disk"].update(bytes_per_s={"mean": 0, "sd": 0, "n": 1, "minimum": 0, "maximum": 0}), "is 0"),
        (lambda d: d["model"].update(hash=-5), "hash"),
        (lambda d: d["memory"].update(min_window_bytes=0), "min_window_bytes"),
        (lambda d: d.update(prefill_tokens=1.5), "prefill_tokens"),
        (lambda d: d.update(kv_bytes_per_token="10"), "kv_bytes_per_token"),
    ],
)
def test_bad_values(tmp_path, profile, change, said):
    with pytest.raises(ProfileError, match=said) as caught:
        load_profile(written(tmp_path, profile, change))
    assert "\n" not in str(caught.value)
    assert "h2o profile" in caught.value.next_step


def test_infinite_values_cannot_be_built():
    with pytest.raises(ValueError, match="finite"):
        Spread(math.inf, 0.0, 1, math.inf, math.inf)
    with pytest.raises(ValueError, match="finite"):
        Spread(math.nan, 0.0, 1, math.nan, math.nan)


def test_profile_of_another_model(profile):
    profile.check_model(77)
    profile.check_model(0)
    with pytest.raises(ProfileError, match="another model"):
        profile.check_model(78)

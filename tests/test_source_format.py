import pytest
from source_profiles import SOURCE_PROFILES

from planner.source.profile import (
    SourceProfile,
    export_source,
    import_source,
    load_foreign,
    parse_log,
    save_source,
)
from runtime.errors import ProfileError
from runtime.sizes import MIB

SMALL = SourceProfile(692, (28, 28, 30), (37, 36, 12), (9, 0, 10))


def log_text(layers=3, times=(100, 200, 50)):
    lines = ["main: build = 1", ""]
    for i in range(layers):
        ms = times[i]
        speed = 20 * 1000 / ms
        lines += [
            f"prefetch index:blk.{i}, prefetch time:{ms}, layer size:20 MB, IO Speed:{speed} MB/s",
            f"compute index:blk.{i} compute time:{30 + i} ms",
            f"release index:blk.{i}, release time:{i} ms",
        ]
    return "\n".join(lines) + "\n"


def test_import_is_mib_and_milliseconds():
    profile = import_source(SMALL)
    assert profile.disk.bytes_per_s.mean == 692 * MIB
    assert [layer.bytes for layer in profile.layers] == [28 * MIB, 28 * MIB, 30 * MIB]
    first = profile.layers[0]
    assert first.io_s.mean == pytest.approx(28 / 692)
    assert first.decode_compute_s == first.prefill_compute_s
    assert (first.decode_compute_s.mean, first.release_s.mean) == (0.037, 0.009)


@pytest.mark.parametrize("name", SOURCE_PROFILES)
def test_shipped_profiles_survive_the_round_trip(name, tmp_path):
    source = SOURCE_PROFILES[name]
    assert export_source(import_source(source)) == source
    save_source(source, tmp_path / "out.json")
    assert export_source(load_foreign(tmp_path / "out.json")) == source


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a source profile"),
        ("{}", "io_speed"),
        ('{"io_speed":1,"layer_sizes":[1],"t_compute":[1,2],"t_release":[1]}', "1, 2 and 1 entries"),
        ('{"io_speed":1,"layer_sizes":[],"t_compute":[],"t_release":[]}', "0, 0 and 0"),
        ('{"io_speed":0,"layer_sizes":[1],"t_compute":[1],"t_release":[1]}', "above 0"),
        ('{"io_speed":5,"layer_sizes":[0],"t_compute":[1],"t_release":[1]}', "above 0"),
        ('{"io_speed":5,"layer_sizes":[1],"t_compute":[-1],"t_release":[1]}', "negative"),
    ],
)
def test_bad_source_json(tmp_path, text, said):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ProfileError, match=said):
        load_foreign(tmp_path / "s.json")


def test_missing_source_json(tmp_path):
    with pytest.raises(ProfileError, match="cannot read"):
        load_foreign(tmp_path / "s.json")


def test_too_small_for_the_source_format():
    profile = import_source(SMALL)
    tiny = [layer.__copy__() for layer in profile.layers]
    import msgspec

    small = msgspec.structs.replace(tiny[0], bytes=MIB - 1)
    profile = msgspec.structs.replace(profile, layers=(small, *tiny[1:]))
    with pytest.raises(ProfileError, match="no four-key form"):
        export_source(profile)


def test_log():
    log = parse_log(log_text())
    assert log.io_ms == (100, 200, 50)
    profile = log.to_profile()
    # their rule: round(mean(200, 100, 400)); ours: all bytes / all time = 60 MiB / 0.35 s
    assert export_source(profile) == SourceProfile(233, (20, 20, 20), (30, 31, 32), (0, 1, 2))
    assert profile.disk.bytes_per_s.mean == pytest.approx(60 * MIB / 0.35)


def test_log_in_any_order():
    text = log_text()
    assert parse_log("\n".join(reversed(text.splitlines()))) == parse_log(text)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("prefetch time:200", "prefetch time:0", "log line 6.*zero"),
        ("IO Speed:100.0", "IO Speed:inf", "log line 6.*infinite"),
        ("IO Speed:100.0", "IO Speed:nan", "log line 6"),
        ("compute time:31", "compute time:0", "log line 7.*zero"),
        ("release time:1", "release time:-1", "log line 8.*negative"),
        ("compute time:31 ms", "compute time:", "log line 7: not a compute line"),
        ("layer size:20 MB, IO Speed:100.0", "layer size:2-0 MB, IO Speed:100.0", "log line 6: not a number"),
        (
            "compute index:blk.1 compute time:31 ms\n",
            "",
            "no complete set of compute lines .found 3 prefetch, 2 compute",
        ),
        ("release index:blk.2, release time:2 ms\n", "", "no complete set of release lines"),
        ("compute index:blk.1", "compute index:blk.0", "log line 7: layer 0 has a second compute line"),
        ("blk.2", "blk.3", "no complete set of prefetch lines"),
    ],
)
def test_bad_log(old, new, said):
    text = log_text().replace(old, new)
    assert text != log_text()
    with pytest.raises(ProfileError, match=said):
        parse_log(text)


def test_empty_log():
    with pytest.raises(ProfileError, match="neither a profile nor a profile log"):
        parse_log("nothing here\n")


def test_log_where_a_whole_line_kind_is_missing():
    text = "\n".join(line for line in log_text().splitlines() if not line.startswith("prefetch"))
    with pytest.raises(ProfileError, match="prefetch"):
        parse_log(text)

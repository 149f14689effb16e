"""Foreign tables: what each format says, what is flagged, and that nothing is filled in or mixed with our rows."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import TableError
from edgeprune.foreign_tables import Imported, additive_model, import_table
from edgeprune.kernel import Kernel
from edgeprune.table import read_lines, read_table
from edgeprune.table_listing import Listing, read_listing
from edgeprune.table_merging import merge
from tests.test_table import row, session, written

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
HALP = {"8_64_128_56_3_1": 1.5, "8_64_256_56_3_1": 2.5, "8_96_96_28_3_2_96": 0.25}
OFA = """\
Conv-input:160x160x3-output:80x80x24: {mean: 0.1, std: 0.01}
expanded_conv-input:80x80x24-output:40x40x32-expand:72-kernel:3-stride:2-idskip:0-se:0-hs:0: {mean: 0.2}
expanded_conv-input:80x80x24-output:40x40x32-expand:96-kernel:3-stride:2-idskip:0-se:0-hs:0: {mean: 0.3}
Logits-input:1x1x1536-output:1000: {mean: 0.7}
"""
NVIT = {"EMB_256": {"QK_12_16": {"V_16": {"MLP_128": 0.007, "MLP_256": 0.008}}}}
SPDY = "base\n0.5\nprunable\n0.4\nconv1\n0.02 0.0000\n0.01 0.4000\nlayer1.0.conv1\n0.005 0.0000\n0.006 0.4000\n"


def imported(folder: Path, name: str, content: object, **options: str) -> tuple[Imported, Listing]:
    source, out = folder / name, folder / (name + "l.jsonl")
    source.write_text(content if isinstance(content, str) else json.dumps(content))
    return import_table(source, out, **options), read_listing(str(out))


def kinds(done: Imported) -> list[tuple[str, str]]:
    return [(flag.kind, flag.name) for flag in done.flags]


def test_halp_keys_become_convolutions(tmp_path: Path) -> None:
    done, listing = imported(tmp_path, "titanv.json", HALP, precision="fp16")
    assert (done.format, done.unit, done.entries, done.kernels, done.flags) == ("halp", "ms", 3, 3, ())
    first, _, depthwise = listing.items
    assert first.latency_us == 1500.0
    assert first.kernel == Kernel(
        operator="conv",
        c_in=64,
        c_out=128,
        batch=8,
        spatial=(56, 56),
        window=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        precision="fp16",
    )
    assert depthwise.kernel is not None and depthwise.kernel.is_depthwise and depthwise.kernel.spatial_out == (14, 14)
    assert (listing.origin, listing.description) == ("imported", "halp table titanv.json")


@pytest.mark.golden
def test_what_an_import_writes_is_pinned(tmp_path: Path) -> None:
    """After a wanted change: EDGEPRUNE_UPDATE_GOLDEN=1 pytest tests/test_foreign_tables.py"""
    falling = HALP | {"8_64_512_56_3_1": 2.0}
    done, _ = imported(tmp_path, "titanv.json", falling, precision="fp16")
    golden = GOLDEN / "imported_v1.jsonl"
    if os.environ.get("EDGEPRUNE_UPDATE_GOLDEN"):
        golden.write_bytes(done.out.read_bytes())
    assert done.out.read_bytes() == golden.read_bytes()


def test_negative_missing_falling_and_absent_cells_are_flagged_and_never_filled(tmp_path: Path) -> None:
    cells = {
        "1_8_8_4_1_1": 2.0,
        "1_8_16_4_1_1": 1.0,  # faster than with 8 output channels
        "1_16_8_4_1_1": -3.0,
        "1_8_24_4_1_1": None,
        "1_24_8_4_1_1": 4.0,  # 24 > 16 and 24 > 24 aren't there
    }
    done, listing = imported(tmp_path, "t.json", cells)
    assert kinds(done) == [
        ("negative", "1_16_8_4_1_1"),
        ("missing", "1_8_24_4_1_1"),
        ("not monotone", "1_8_16_4_1_1"),
        ("hole", "b1 4x4 k1 s1[c_in=24, c_out=16]"),
    ]
    assert {item.name: item.latency_us for item in listing.items} == {
        "1_8_8_4_1_1": 2000.0,
        "1_8_16_4_1_1": 1000.0,
        "1_24_8_4_1_1": 4000.0,
    }
    assert listing.items[1].flags == ("not monotone: 50.0% faster than 1_8_8_4_1_1, of less c_out",)


def test_nan_is_missing(tmp_path: Path) -> None:
    done, _ = imported(tmp_path, "t.json", '{"1_8_8_4_1_1": 1.0, "1_8_16_4_1_1": NaN, "1_8_24_4_1_1": 1e999}')
    assert kinds(done) == [("missing", "1_8_16_4_1_1"), ("missing", "1_8_24_4_1_1")]


def test_entries_of_once_for_all_add_up_to_exactly_the_sum_by_hand(tmp_path: Path) -> None:
    """0.1 + 0.2 is 0.3 here, as by hand; added in floating point it is 0.30000000000000004."""
    done, listing = imported(tmp_path, "160_lookup_table.yaml", OFA)
    assert (done.format, done.unit, done.kernels, done.flags) == ("ofa", "ms", 0, ())
    model = additive_model(listing)
    first, small, large, logits = model.values
    assert model.predict([first, small, logits]) == 1.0
    assert model.predict([first, small]) == 0.3
    assert model.predict([large] * 3) == 0.9
    with pytest.raises(TableError, match="no entry 'Logits'"):
        model.predict(["Logits"])


def test_the_benchmark_of_the_sum() -> None:
    script = ROOT / "benchmarks" / "ofa_sum.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 sums equal the sum by hand exactly, 0 differ" in done.stdout


def test_nvit_blocks(tmp_path: Path) -> None:
    done, listing = imported(tmp_path, "latency_head.json", NVIT)
    assert (done.format, done.unit, done.entries) == ("nvit", "s", 2)
    assert [(item.name, item.latency_us) for item in listing.items] == [
        ("EMB_256/QK_12_16/V_16/MLP_128", 7000.0),
        ("EMB_256/QK_12_16/V_16/MLP_256", 8000.0),
    ]


def test_spdy_layers_by_sparsity(tmp_path: Path) -> None:
    done, listing = imported(tmp_path, "rn18_unstr.txt", SPDY)
    assert (done.format, done.unit, done.entries) == ("spdy", "s", 6)
    assert {item.name: item.value for item in listing.items}["layer1.0.conv1@0.4000"] == 0.006
    assert kinds(done) == [("not monotone", "layer1.0.conv1@0.0000")]  # dense beats 40 % sparse


def test_csv_of_kernels_and_of_names(tmp_path: Path) -> None:
    text = "operator,c_in,c_out,epilogue,latency_ms,colour\nlinear,8,16,bias+relu,0.5,red\nlinear,8,32,bias+relu,,\n"
    done, listing = imported(tmp_path, "t.csv", text)
    (item,) = listing.items
    assert item.kernel == Kernel(operator="linear", c_in=8, c_out=16, epilogue=("bias", "relu"))
    assert item.latency_us == 500.0
    assert kinds(done) == [("missing", "linear 8>32 g1 b1 +bias+relu fp32 dense")]
    done, listing = imported(tmp_path, "n.csv", "name,latency_us\nstem,5\nhead,1\nhead,2\n")
    assert kinds(done) == [("contradicting", "head")]
    assert [item.name for item in listing.items] == ["stem"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", '{"1_8_8_4_1_1": 1.0, "1_8_8_4_1_1": 1.0}', "t.json: the key '1_8_8_4_1_1' stands here twice"),
        ("t.json", '{"1_8_8_4_1_1": "fast"}', "expected a latency at '1_8_8_4_1_1', found 'fast'"),
        ("t.json", '{"1_8_8_4_1_1": 1.0, "x": 1.0}', "t.json:x: expected a key batch_cin_cout"),
        ("t.json", '{"1_8_9_4_1_1_2": 1.0}', "1_8_9_4_1_1_2: groups=2 divides not both"),
        ("t.json", '{"1_8_8_4_1_1": -1.0}', "holds no latency that can be imported"),
        ("t.json", '{"a": 1}', "which format is this"),
        ("t.json", '{"EMB_2": {"QK_1": {}}}', "expected a key QK_"),
        ("t.json", '{"EMB_2": 3}', "t.json:EMB_2: expected keys QK_"),
        ("t.yaml", "a: {mean: 1}\n", "expected a name like"),
        ("t.yaml", "Conv-input:1: 3\n", "expected {mean: latency}"),
        ("t.yaml", "Conv-input:1: {mean: 1}\nConv-input:1: {mean: 2}\n", "t.yaml:2: not YAML: found duplicate key"),
        ("t.yaml", "Conv-input:1: !!python/object/apply:os.system [ls]\n", "t.yaml:1: not YAML"),
        ("t.txt", "conv1\n1 2 3\n", "t.txt:2: expected a layer or 'seconds sparsity'"),
        ("t.txt", "conv1\n0.1 1.5\n", "t.txt:2: expected a sparsity from 0 to 1"),
        ("t.csv", "name,latency\na,1\n", "t.csv:1: expected one column of latency_us"),
        ("t.csv", "name,latency_us\na\n", "t.csv:2: a row of another length"),
        ("t.csv", "operator,c_in,c_out,latency_us\nconv,x,1,1\n", "t.csv:2: invalid literal"),
        ("t.csv", "c_in,latency_us\n1,1\n", "expected a column 'name' or 'operator'"),
        ("t.json", "", "is empty"),
        ("t.json", '{"' + "9" * 5000 + '_8_8_4_1_1": 1.0}', "which format is this"),
        ("t.csv", "name,latency_us\n" + "n" * 2000 + ",1\n", "can't be kept, name: String should have at most 1000"),
        ("t.yaml", 'Conv-input:1-expand:999999999999999999999: {mean: "a"}', "expected a latency at"),
        ("t.yaml", '"input:\\ud800": {mean: 1}', "t.yaml"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_its_place(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TableError) as raised:
        import_table(tmp_path / name, tmp_path / "out.jsonl")
    assert message in str(raised.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_pickles_are_never_read(tmp_path: Path) -> None:
    for name, protocol in (("lut.bin", 4), ("lut.pkl", 0)):
        (tmp_path / name).write_bytes(pickle.dumps(HALP, protocol=protocol))
        with pytest.raises(TableError, match=r"is a pickle, .* never read; .* json\.dump"):
            import_table(tmp_path / name, tmp_path / "out.jsonl")


def test_options_are_checked(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,latency_us\na,1\n")
    for options, message in (
        ({"format": "hlap"}, "no format 'hlap'; did you mean 'halp'"),
        ({"unit": "min"}, "no unit 'min'"),
        ({"precision": "fp8"}, "no precision 'fp8'"),
        ({"unit": "ms"}, "its column says us, --unit ms"),
    ):
        with pytest.raises(TableError, match=message):
            import_table(tmp_path / "t.csv", tmp_path / "out.jsonl", **options)


def test_imported_entries_stay_apart_from_measured_rows(tmp_path: Path) -> None:
    done, _ = imported(tmp_path, "t.json", HALP)
    with pytest.raises(TableError, match="exists already; imported entries get a file of their own"):
        import_table(tmp_path / "t.json", done.out)
    assert len(read_table(done.out)) == 0  # what planning reads
    assert len(read_lines([done.out]).imported) == 3
    measured = written(tmp_path / "m.jsonl", session(), row())
    with pytest.raises(TableError, match="imported entries and measured rows are kept in files of their own"):
        merge([done.out, measured], tmp_path / "all.jsonl")
    with pytest.raises(TableError, match="is measured; only imported entries add up"):
        additive_model(read_listing(str(measured)))


def test_the_fingerprint_is_the_source(tmp_path: Path) -> None:
    one, _ = imported(tmp_path, "a.json", HALP)
    two, _ = imported(tmp_path, "b.json", HALP | {"8_64_512_56_3_1": 3.0})
    assert one.facts["source"] == "a.json"
    assert len(one.facts["sha256"]) == 64
    assert one.fingerprint != two.fingerprint


SOURCES = {
    "halp": json.dumps(HALP),
    "ofa": OFA,
    "nvit": json.dumps(NVIT),
    "spdy": SPDY,
    "csv": "name,latency_us\na,1\n",
}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_source_is_an_error_or_is_read_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    format = data.draw(st.sampled_from(sorted(SOURCES)))
    text = SOURCES[format]
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 12)))
    damaged = text[:start] + data.draw(st.text(max_size=6)) + text[end:]
    folder = tmp_path_factory.mktemp("damaged")
    source, out = folder / "source", folder / "out.jsonl"
    source.write_bytes(damaged.encode("utf-8", "surrogatepass"))
    try:
        done = import_table(source, out, format=format)
    except TableError:
        assert not out.exists()
    else:
        listing = read_listing(str(out))
        assert (len(listing.items), listing.warnings) == (done.entries, ())

"""process_data.py as a program: runs that fail, manifest, copies, its output, its imports and its memory."""

import hashlib
import json
import os
import pty
import random
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import ROOT, rows_of, run, triplet, write_jsonl, write_texts
from fsspec.implementations.memory import MemoryFileSystem


def one_complaint(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("process_data: ")
    assert error.count("\n") == 1
    return error


def test_too_many_bad_lines_fail_and_leave_only_the_evidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"text {i}" for i in range(95)] + ["\0"] * 5
    source = write_texts(tmp_path / "in.txt", lines)
    out = tmp_path / "out"
    assert run("unsupervised", source, out, "--max_rejected", 0.04) == 2
    message = one_complaint(capsys)
    reasons = "line 96: text holds a NUL character; line 97: text holds a NUL character; line 98: text holds"
    for part in ("5 of 100 lines", "5.0%", "--max_rejected 0.04", reasons, str(out / "rejected.jsonl")):
        assert part in message
    assert "line 99" not in message
    assert [path.name for path in out.iterdir()] == ["rejected.jsonl"]
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 5
    assert run("unsupervised", source, out, "--max_rejected", 0.05) == 0
    assert len(rows_of(out, "train")) == 95


def test_a_failing_run_leaves_the_earlier_outputs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("unsupervised", write_texts(tmp_path / "good.txt", ["a"]), out) == 0
    before = {name: (out / name).read_bytes() for name in ("train.parquet", "test.parquet", "manifest.json")}
    assert run("unsupervised", write_texts(tmp_path / "bad.txt", ["b", "\0"]), out) == 2
    assert {name: (out / name).read_bytes() for name in before} == before


FAILURES = [
    ("unsupervised", "in.txt", None, [], "in.txt does not exist"),
    ("unsupervised", "in.txt", b"", [], "in.txt is empty"),
    ("unsupervised", "in.txt", b"\n  \n", [], "has no sample: 2 lines are blank, 0 rejected"),
    (
        "unsupervised",
        "in.txt",
        b"\0\n",
        ["--max_rejected", "1"],
        "has no sample: 0 lines are blank, 1 rejected",
    ),
    (
        "unsupervised",
        "in.jsonl",
        b'{"title": 1, "body": "b"}\n' * 3,
        [],
        "found title, body; --mode unsupervised needs text|sentence",
    ),
    (
        "supervised",
        "in.jsonl",
        b'{"query": "q", "pos": "p"}\n',
        [],
        "found query, pos; --mode supervised needs query|anchor|sent0,",
    ),
    (
        "supervised",
        "in.csv",
        b"query,positive\na,b\n",
        [],
        "in.csv has no column of negatives (negative|neg",
    ),
    ("supervised", "in.csv", b'a"b\n"', [], "--mode supervised needs"),
    ("unsupervised", "in.csv", b"te\xffxt\na\n", [], "not UTF-8"),
    ("unsupervised", "in.parquet", b"not parquet", [], "is not a readable parquet file"),
    ("unsupervised", "in.txt", b"a\n", ["--test_ratio", "1"], "--test_ratio is 1.0"),
    ("unsupervised", "in.txt", b"a\n", ["--test_ratio", "-0.1"], "--test_ratio is -0.1"),
    ("unsupervised", "in.txt", b"a\n", ["--test_ratio", "nan"], "--test_ratio is nan"),
    ("unsupervised", "in.txt", b"a\n", ["--max_samples", "0"], "--max_samples is 0"),
    ("unsupervised", "in.txt", b"a\n", ["--max_rejected", "2"], "--max_rejected is 2.0"),
]


@pytest.mark.parametrize(("mode", "name", "content", "more", "message"), FAILURES)
def test_failures_are_one_line_and_exit_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    name: str,
    content: bytes | None,
    more: list[str],
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(mode, tmp_path / name, tmp_path / "out", *more) == 2
    assert message in one_complaint(capsys)
    left = {path.name for path in (tmp_path / "out").iterdir()} if (tmp_path / "out").exists() else set()
    assert left <= {"rejected.jsonl"}


def test_wrong_parquet_columns_folders_and_overwriting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"title": ["a"]}), tmp_path / "in.parquet")
    assert run("unsupervised", tmp_path / "in.parquet", tmp_path / "out") == 2
    assert "has the columns title; --mode unsupervised needs text|sentence" in one_complaint(capsys)
    assert run("unsupervised", tmp_path, tmp_path / "out") == 2
    assert "is not a file" in one_complaint(capsys)
    source = write_jsonl(tmp_path / "train.json", [{"text": "a"}])
    assert run("unsupervised", source, tmp_path) == 2
    assert "would be overwritten" in one_complaint(capsys)
    assert source.exists()
    assert run("unsupervised", source, source) == 2
    assert "is not a folder" in one_complaint(capsys)


def test_damaged_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.parquet"
    texts = [f"text {random.Random(i).random()}" for i in range(5_000)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:2_000] = b"\xff" * 1_996
    path.write_bytes(data)
    assert run("unsupervised", path, tmp_path / "out") == 2
    one_complaint(capsys)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_manifest_describes_the_files(tmp_path: Path) -> None:
    lines = ["a", "", "b", "a", "c\0"]
    source = write_texts(tmp_path / "in.txt", lines)
    out = tmp_path / "out"
    assert run("unsupervised", source, out, "--test_ratio", 0.4, "--max_rejected", 0.5, "--write_json") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {
        "lines": 5,
        "blank": 1,
        "accepted": 3,
        "rejected": 1,
        "train": 2,
        "test": 1,
        "duplicates": 1,
        "test_also_in_train": 1,
    }
    names = {"train.parquet", "test.parquet", "train.json", "test.json", "rejected.jsonl"}
    assert set(manifest["outputs"]) == names
    assert {path.name for path in out.iterdir()} == names | {"manifest.json"}
    for path, entry in [(source, manifest["input"]), *((out / n, manifest["outputs"][n]) for n in names)]:
        data = path.read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest["arguments"]["test_ratio"] == 0.4
    assert manifest["versions"]["pyarrow"] == pa.__version__


def test_json_arrays_hold_the_parquet_rows_and_do_not_go_stale(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [triplet(i, source="süß") for i in range(3)])
    assert run("supervised", source, tmp_path / "out", "--write_json", "--test_ratio", 0) == 0
    train = (tmp_path / "out" / "train.json").read_text("utf-8")
    assert json.loads(train) == rows_of(tmp_path / "out", "train")
    assert "süß" in train
    assert json.loads((tmp_path / "out" / "test.json").read_text()) == []
    assert run("supervised", source, tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["manifest.json"]


def test_copies(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in.txt", ["a", "b"])
    out, existing = tmp_path / "out", tmp_path / "existing"
    existing.mkdir()
    names = {"train.parquet", "test.parquet", "rejected.jsonl", "manifest.json"}
    for target in (str(existing), f"file://{tmp_path}/new/deep/", "memory://copies/here"):
        assert run("unsupervised", source, out, "--hdfs_dir", target) == 0
        filesystem, folder = fsspec.core.url_to_fs(target)
        found = {Path(path).name: filesystem.cat_file(path) for path in filesystem.ls(folder, detail=False)}
        assert found == {name: (out / name).read_bytes() for name in names}


def test_failing_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_texts(tmp_path / "in.txt", ["a", "b"])
    for target, cause in [(str(source), "FileExistsError"), ("nosuch://x/y", "Protocol not known: nosuch")]:
        assert run("unsupervised", source, tmp_path / "out", "--hdfs_dir", target) == 2
        message = one_complaint(capsys)
        assert target in message
        assert cause in message
        assert len(rows_of(tmp_path / "out", "train")) == 2
    monkeypatch.setattr(MemoryFileSystem, "size", lambda *_: 1)
    assert run("unsupervised", source, tmp_path / "out", "--hdfs_dir", "memory://short") == 2
    assert "has 1 bytes there" in one_complaint(capsys)


def test_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_texts(tmp_path / "in.txt", ["first text", "second text", "", "second text"])
    assert run("unsupervised", source, tmp_path, "--test_ratio", 0.4) == 0
    captured = capsys.readouterr()
    assert "4 lines, 3 accepted, 1 blank, 0 rejected" in captured.out
    assert "train 2 rows, test 1 rows" in captured.out
    assert "1 samples repeat an earlier one; 0 test samples" in captured.out
    assert "'second text'" in captured.out
    assert captured.err == ""


def program(*argv: object) -> list[str]:
    return [sys.executable, str(ROOT / "process_data.py"), *map(str, argv)]


def test_imports_are_light() -> None:
    code = (
        "import sys, process_data; print([m for m in ('torch', 'ray', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_progress_shows_on_a_terminal_and_only_there(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in.txt", ["text"] * 20)
    argv = program("--mode", "unsupervised", "--input_file", source, "--local_dir", tmp_path)
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stderr == ""
    ours, theirs = pty.openpty()
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=theirs, check=True, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    assert b"reading" in os.read(ours, 65_536)
    os.close(ours)


def peak_mb(argv: list[str]) -> float:
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / 1024


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for num in (80_000, 320_000):  # 48 and 192 MB: were the texts held once, the peaks would be 144 MB apart
        source = tmp_path / f"{num}.txt"
        with source.open("w") as file:
            file.writelines(f"{i:09d} {'word ' * 118}\n" for i in range(num))
        peaks.append(peak_mb(program("--mode", "unsupervised", "--input_file", source, "--local_dir", tmp_path)))
        source.unlink()
    assert peaks[1] - peaks[0] < 72, peaks

import numpy as np
import pytest

from experiments.datasets import ptb

SIZES = {"train": 5_059_550, "valid": 396_412, "test": 446_184}


@pytest.fixture(scope="module")
def originals(data_dir):
    folder = data_dir / "ptb"
    if not all((folder / f"ptb.{split}.txt").exists() for split in SIZES):
        pytest.skip(f"needs the three original Penn Treebank files in {folder}")
    return folder


@pytest.fixture(scope="module")
def made(originals, data_dir, tmp_path_factory):
    return ptb.prepare(data_dir, tmp_path_factory.mktemp("work"))


def test_split_sizes_and_vocabulary_match_the_paper(made):
    arrays, info, source = made
    assert {split: len(array) for split, array in arrays.items()} == SIZES
    vocabulary = info["vocabulary"]
    assert len(vocabulary) == 50 and list(vocabulary) == sorted(set(vocabulary))
    assert info.keys() == {"vocabulary"}
    assert len(np.unique(arrays["train"])) == 50
    for array in arrays.values():
        assert array.dtype == np.uint8 and array.ndim == 1 and array.max() < 50
    assert [file["downloaded_from"] for file in source["files"]] == [None] * 3


@pytest.mark.parametrize("split", SIZES)
def test_symbols_decode_to_the_original_lines(made, originals, split):
    arrays, info, _ = made
    text = "".join(map(info["vocabulary"].__getitem__, arrays[split].tolist()))
    lines = (originals / f"ptb.{split}.txt").read_text(encoding="ascii").split("\n")
    assert lines.pop() == ""
    assert text.split("\n")[:-1] == [line[1:] for line in lines if line[0] == " "]
    assert text.endswith(" \n")
    assert len(lines) == {"train": 42_068, "valid": 3_370, "test": 3_761}[split]
    first = {"train": "aer banknote", "valid": "consumers may", "test": "no it was"}[split]
    assert text.startswith(first)

"""What the command line refuses before it opens a model or reads data, and that nothing is left of it."""

import pytest
from command_line import run, said

from secateur.cli import BAD_INPUT
from secateur.errors import ModelError, SettingError
from secateur.method import load
from secateur.outcome import write_text


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "gblm", "dsnot", "oneshot", "ecoflap", "snip"])
def test_no_or_fewer_samples_are_refused_before_any_is_read(name):
    for samples in (0, -3):
        with pytest.raises(SettingError, match=f"{samples} (calibration )?samples were asked for"):
            load(name)(samples=samples).check()


def test_what_cannot_be_written_is_refused_first_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    there = sorted(tmp_path.iterdir())
    saved = ("prune", "tiny:mlp", "magnitude", "--task", "tiny:toy_vectors", "--no-eval", "--out")
    assert "is a file, and no folder" in said(run(*saved, f"{tmp_path}/file/out", code=BAD_INPUT))
    told = said(run(*saved, f"{tmp_path}/new", "--resume", f"{tmp_path}/file", code=BAD_INPUT))
    assert "Give --resume a folder" in told
    run(*saved, f"{tmp_path}/folder/new")
    told = said(run("report", f"{tmp_path}/folder/new", "--out", f"{tmp_path}/folder", code=BAD_INPUT))
    assert "a folder of that name is there" in told
    told = said(run("compare", "tiny:mlp", "--methods", "wanda", "--out", f"{tmp_path}/folder", code=BAD_INPUT))
    assert "a folder of that name is there" in told
    told = said(run("densify", f"{tmp_path}/nothing", code=BAD_INPUT))
    assert "there is no such file" in told
    with pytest.raises(ModelError, match="the system refused"):
        write_text(tmp_path / "folder", "text")
    assert sorted(tmp_path.iterdir()) == there

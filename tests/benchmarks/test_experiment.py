"""benchmarks/experiment.py: names, what is open, parts that processes share, and a training run that fails."""

import pytest

from benchmarks.experiment import Arm, Bench, Experiment, TrainingRun, Trial, claimed

BASE, OTHER = Arm("ffs", "S/2", 0.2, 1), Arm("ffs", "S/2", 0.0, 1)
REAL = Trial("ffs", None, "generate", "test", "", 2)
FAKE = Trial("ffs", BASE, "generate", "sampled", "ddim:50", 2, step=10)


class Parts(Bench):
    """Two parts a measurement, of which this process makes those that are not claimed."""

    def __init__(self, out):
        self.trials, self.out, self.made = [REAL, FAKE], out, []

    def parts(self, trial):
        return [self.out / trial.name / f"{k}.json" for k in range(2)]

    def make(self, trial, number, path):
        self.made.append((trial.name, number))
        path.write_text("{}")


class Small(Experiment):
    """Two arms."""

    def __init__(self, out):
        super().__init__("tests", out)
        self.parts = Parts(out)

    def arms(self):
        return [BASE, OTHER]

    def run(self, arm):
        return TrainingRun(arm.name, self.out / "runs", 20, [], arm.settings)

    @property
    def benches(self):
        return {"ffs": self.parts}


def test_names_tell_arms_and_trials_apart():
    assert BASE.name == "ffs_S-2_p0.2_s1"
    assert Arm("", "XL/2", 1.0).name == "XL-2_p1"
    assert Arm("d", "T/4", 1.0, 0, "chunk").name == "d_T-4_p1_chunk_s0"
    assert Arm("", "XL/2", 1.0).settings == {"model": "XL/2", "p": 1.0}, "the seed of the settings is kept"
    assert (REAL.name, FAKE.name) == ("ffs/generate/test", "ffs_S-2_p0.2_s1/generate/sampled/ddim-50/00000010")
    assert FAKE.solver == ("ddim", 50)


def test_what_is_open_waits_for_its_checkpoint_and_is_made_once(tmp_path, capsys):
    small = Small(tmp_path)
    assert [trial for _, trial in small.open_trials()] == [REAL]
    small.run(BASE).checkpoint(10).mkdir(parents=True)
    assert [trial for _, trial in small.open_trials()] == [REAL, FAKE]
    assert [trial for _, trial in small.open_trials("*/sampled/*")] == [FAKE]
    with claimed(small.parts.parts(FAKE)[0]) as mine, claimed(small.parts.parts(FAKE)[0]) as theirs:
        assert mine
        assert not theirs
        small.work()
    assert small.parts.made == [(REAL.name, 0), (REAL.name, 1), (FAKE.name, 1)], "another process makes the first"
    assert capsys.readouterr().out == "ffs/generate/test: measured\n"
    small.work()
    assert small.parts.made[3:] == [(FAKE.name, 0)]
    assert small.open_trials() == []


@pytest.mark.parametrize("code", [0, 3])
def test_training_runs_that_are_missing_are_started_and_a_failure_is_named(tmp_path, monkeypatch, code):
    monkeypatch.setattr(TrainingRun, "command", property(lambda run: ["sh", "-c", f"exit {code}"]))
    small = Small(tmp_path)
    small.run(BASE).checkpoint().mkdir(parents=True)
    assert small.train("*p0.2*"), "done, and not started again"
    if not code:
        assert not small.train(at_once=2, quiet=True)
        return
    with pytest.raises(ValueError, match="run ffs_S-2_p0_s1 ended with code 3"):
        small.train()

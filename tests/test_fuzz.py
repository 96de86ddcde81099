"""A minute of the fuzz, always of the same calls as far as it comes; and that it can fail."""

import fuzz
import pytest
import torch
from conftest import ROOT

from rpe_ops import rpe_attention_eager


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_drawn_calls_are_those_of_the_law():
    said = []
    assert fuzz.fuzz(0, 60, 10**9, said.append) == 0, "\n".join(said)


def test_a_wrong_backend_is_told_with_the_command_that_repeats_it(monkeypatch):
    right, said = rpe_attention_eager.look_up, []
    assert fuzz.fuzz(100, 100, 12, said.append) == 0, said
    monkeypatch.setattr(rpe_attention_eager, "look_up", lambda table, place: right(table, place) * 1.01)
    monkeypatch.setattr(fuzz, "backends_of", lambda call: ["eager"])
    # the formula of rpe_ops, since irpe.py has its own for calls without dropout
    monkeypatch.setattr(fuzz, "draw", lambda seed, draw=fuzz.draw: draw(seed)._replace(dropout_p=0.3))
    said.clear()
    assert fuzz.fuzz(100, 100, 12, said.append) > 0
    command = said[0].split("\n")[1]
    seed = int(command.split()[3])
    assert command == f"python tests/fuzz.py --seed {seed} --count 1" and f"Call(seed={seed}, " in said[0]
    assert "backend eager" in said[0] and said[-1].startswith("12 calls from seed 100, ")


def test_the_command(run_python):
    out = run_python(
        f"""
        import runpy, sys
        sys.argv = ["fuzz.py", "--seed", "3", "--count", "2"]
        try:
            runpy.run_path({str(ROOT / "tests" / "fuzz.py")!r}, run_name="__main__")
        except SystemExit as end:
            print("exit", end.code)
        """
    ).stdout
    assert "seed 3\n2 calls from seed 3, 0 wrong" in out and "exit False" in out

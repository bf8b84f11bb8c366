"""Verdicts and majorities by many completions; hostile mathematics harms nothing."""

import contextlib
import importlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pebble
import pytest

from plasticity_jax.errors import UserError
from plasticity_jax.evaluate import grading_worker
from plasticity_jax.evaluate.answers import GRADERS, extract_answer
from plasticity_jax.evaluate.grading import Grading, Verdict
from plasticity_jax.evaluate.grading_worker import MAX_CHARACTERS

# As math-verify itself judges them, and as a reader would.
MATHEMATICS = [
    ("\\frac{1}{2}", "0.5", True),
    ("1/2", "\\frac12", True),
    ("x+1", "1+x", True),
    ("(x+1)^2", "x^2+2x+1", True),
    ("2\\sqrt{3}", "\\sqrt{12}", True),
    ("\\{1,2\\}", "\\{2,1\\}", True),
    ("(1,2)", "(1,2)", True),
    ("(1,2)", "(2,1)", False),
    ("x=5", "5", True),
    ("1 \\le x \\le 2", "[1,2]", True),
    ("[1,2]", "1 \\le x \\le 2", True),
    ("1,234", "1234", True),
    ("\\$5", "5", True),
    ("10\\%", "10", True),
    ("50^\\circ", "50", True),
    ("5\\text{ cm}", "5", True),
    ("\\text{Evelyn}", "\\text{Evelyn}", True),
    ("\\text{Evelyn}", "\\text{Briana}", False),
    ("6-5i", "-5i+6", True),
    ("\\pi", "3.14159265", True),
    ("\\pi", "3", False),
    ("12 dollars.", "12", True),
    ("$72$ clips", "72", True),
    ("the total is 9", "9", True),
    ("3\\sqrt{2}", "3", False),
    ("2 \\sin x", "2", False),
    ("3", "4", False),
    ("x^2", "x^3", False),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
    ("[1,2)", "[1,2]", False),
    ("yes", "no", False),
    ("", "1", False),
    # Several answers: all of them, in any order.
    ("1728", "1331 and 1728", False),
    ("1728 and 1331", "1331 and 1728", True),
    ("1331, 1728", "1331 and 1728", True),
    ("$1{,}331$ and $1{,}728$", "1331 \\text{ and } 1728", True),
    ("1331 and 1729", "1331 and 1728", False),
    ("9 or 10", "9", False),
    # What math-verify does not read, or not completely, is compared as text.
    ("1+\\frac{1}{\\mathrm{e}}", "1-\\frac{1}{\\mathrm{e}}", False),
    ("1 - \\dfrac{1}{\\mathrm{e}}", "1-\\frac{1}{\\mathrm{e}}", True),
    ("2516_9", "2516_8", False),
    ("2516", "2516_8", False),
    ("2516_{8}", "2516_8", True),
    ("0.\\overline{7}", "0.\\overline{6}", False),
    ("neve", "even", False),
    ("Even.", "\\text{even}", True),
    ("May 20", "\\text{June 20}", False),
    ("10 am", "10\\text{ a.m.}", True),
    ("10 pm", "10\\text{ a.m.}", False),
    ("11 5/6", "71/6", True),
    ("11\\frac{5}{6}", "71/6", True),
    ("11 1/6", "71/6", False),
    ("9!", "9", False),
    ("nine", "9", False),
    ("9x", "9", False),
    ("sqrt(12)", "2\\sqrt{3}", True),
    ("pi/2", "\\frac{\\pi}{2}", True),
]
# What is written around the answer 9: markup, currencies, units, words.
AROUND_NINE = [
    "**9**",
    "**9**.",
    "`9`",
    "$9$",
    "$9",
    "\\$9",
    "-(-9)",
    "€9",
    "£9",
    "9 €",
    "USD 9",
    "9 USD",
    "9 cm^2",
    "9 cm²",
    "9 m^3",
    "9 km/h",
    "9 square units",
]
AROUND_NINE += [
    "9\\text{ cm}^2",
    "9\\,\\text{cm}",
    "9\\mathrm{~cm}",
    "9 dollars per day",
    "about 9",
    "The total is 9 apples",
    "x = 9",
    "9.0",
    "\\boxed{9}",
    "<b>9</b>",
]
# And what is written after it.
AROUND_NINE += [
    "9 because 3*3 = 9",
    "9, which is 3^2",
    "9. So 3 is right",
    "9 (see step 2)",
    "9 — not 8",
    "9\n\nCheck: 2+7",
    "$9$, since 3 + 6 = 9",
    "9 dollars for 7 days",
]
HOSTILE = [
    "9^{9^{9^{9}}}",
    "(((9!)!)!)!",
    "\\binom{10^{9}}{5^{12}}",
    "\\sum_{k=1}^{10^{12}} k^{k}",
    "\\frac{1}{" * 400 + "2" + "}" * 400,
    "\\frac{1}{" * 10**4 + "2" + "}" * 10**4,
    "{" * 10**5,
    "}" * 10**5,
    "(" * 1500,
    "\\sqrt{" * 300 + "x" + "}" * 300,
    "\ud800\udfff\x00\x07",
    "1" * 1900,
]


@pytest.mark.parametrize("grader", ["number", "exact", "letter"])
def test_text_graders_start_no_process(grader, monkeypatch):
    monkeypatch.setattr(pebble, "ProcessPool", None)
    with Grading(grader, faithful=False) as grading:
        assert grading.judge([("1", "1"), (None, "1"), ("2", "1")]) == ["right", "no answer", "wrong"]
        assert grading.majority([["answer is 2", "answer is 1", "answer is 1"], ["x"]]) == [1, 0]


def test_faithful_reaches_the_grader():
    for faithful, verdict in ((False, "right"), (True, "wrong")):
        with Grading("letter", faithful=faithful) as grading:
            assert grading.judge([("(E)", "E")]) == [verdict]


@pytest.fixture(scope="module")
def mathematical():
    with Grading("math", faithful=False, workers=2, seconds=20.0) as grading:
        yield grading


@pytest.fixture(scope="module")
def published():
    with Grading("math", faithful=True, workers=1, seconds=20.0) as grading:
        yield grading


def test_workers_judge_as_a_reader_does(mathematical):
    found = mathematical.judge([(answer, gold) for answer, gold, _ in MATHEMATICS])
    assert [(*pair[:2], verdict == "right") for pair, verdict in zip(MATHEMATICS, found)] == MATHEMATICS


def test_neither_wording_nor_explanations_decide(mathematical):
    for gold, verdict in (("9", "right"), ("8", "wrong"), ("19", "wrong"), ("9^2", "wrong")):
        found = mathematical.judge([(answer, gold) for answer in AROUND_NINE])
        assert [answer for answer, got in zip(AROUND_NINE, found) if got != verdict] == [], gold


# The original gives math-verify the bare strings, which it reads as LaTeX between delimiters only.
@pytest.mark.parametrize(
    ("answer", "gold", "clean", "faithful"),
    [
        ("x+1", "x+1", "right", "wrong"),
        ("\\sqrt{2}", "\\sqrt{2}", "right", "wrong"),
        ("(1,2)", "(1,2)", "right", "wrong"),
        ("3\\sqrt{2}", "3", "wrong", "right"),
        ("1728", "1331 and 1728", "wrong", "right"),
        ("9 because 3*3=27", "9", "right", "wrong"),
        ("\\frac{1}{2}", "0.5", "right", "right"),
        ("$\\sqrt{2}$", "$\\sqrt{2}$", "right", "right"),
    ],
)
def test_faithful_mathematics_is_math_verify_on_bare_strings(mathematical, published, answer, gold, clean, faithful):
    import math_verify

    first, second = (math_verify.parse(text, parsing_timeout=None) for text in (answer, gold))
    assert (math_verify.verify(first, second, timeout_seconds=None) or math_verify.verify(second, first, timeout_seconds=None)) == (
        faithful == "right"
    )
    assert (mathematical.judge([(answer, gold)]), published.judge([(answer, gold)])) == ([clean], [faithful])
    if answer != gold:  # equal texts are one answer in any majority
        texts = [f"\\boxed{{{answer}}}", f"\\boxed{{{gold}}}", "\\boxed{77}", "\\boxed{77.0}"]
        assert published.majority([texts]) == [0 if faithful == "right" else 2]


def test_workers_agree_with_math_verify_in_this_process(mathematical):
    import math_verify

    unlike = ("$", " is ", "dollars", "_", " and ", "mathrm", "overline", "neve", "Even", "May", "m", "pi/2", "11 ", "nine", "9!")
    pairs = [(answer, gold) for answer, gold, _ in MATHEMATICS if answer and not any(part in answer + gold for part in unlike)]
    expected = []
    for answer, gold in pairs:
        first, second = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (answer, gold))
        expected.append(any(math_verify.verify(*order, timeout_seconds=None) for order in ((first, second), (second, first))))
    assert [verdict == "right" for verdict in mathematical.judge(pairs)] == expected


def test_equal_texts_are_right_and_missing_answers_are_none(mathematical):
    assert mathematical.judge([(" ?? ", "??"), (None, "1"), ("1", "1")]) == ["right", "no answer", "right"]


def test_majority_clusters_equivalent_answers(mathematical):
    completions = [
        ["answer is 3", "hm", "\\boxed{0.5}", "answer is 3", "so \\boxed{\\frac12}", "answer is 1/2"],
        ["hm", "hm"],
        ["answer is 2", "answer is 1"],  # tie: first
        ["\\boxed{x+1}", "\\boxed{2}", "\\boxed{\\frac{4}{2}}"],
    ]
    assert mathematical.majority(completions) == [2, 0, 0, 1]
    with pytest.raises(ValueError, match="no completions"):
        mathematical.majority([[]])


@pytest.mark.slow
def test_hostile_answers_end_with_a_verdict_and_the_run_goes_on():
    with Grading("math", faithful=False, workers=2, seconds=1.0, memory_bytes=512 << 20) as grading:
        pairs = [pair for text in HOSTILE for pair in ((text, "1"), ("0.5", "\\frac{1}{2}"))]
        found = grading.judge(pairs)
        assert set(found[::2]) <= {"wrong", "timed out"} and "timed out" in found[::2]
        assert set(found[1::2]) == {"right"}
        assert grading.judge([("0.25", "\\frac{1}{4}")]) == ["right"]
        assert grading.majority([["\\boxed{9^{9^{9^{9}}}}", "\\boxed{2}", "\\boxed{\\frac{4}{2}}"]]) == [1]
        assert grading.judge([("1" * (MAX_CHARACTERS + 1), "1")]) == ["wrong"]


def _worker_pids() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


def test_killed_workers_lose_nothing():
    pairs = [(str(i), str(i + i % 2) + ".0") for i in range(250)]
    with Grading("math", faithful=False, workers=2, seconds=60.0) as grading:
        assert grading.judge([("1", "1.0")]) == ["right"]
        done = threading.Event()
        kills = []

        def kill_now_and_then():
            while not done.wait(0.05) and not kills:  # a second kill could meet the same pair, which then counts as timed out
                for pid in _worker_pids()[:1]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        kills.append(pid)

        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        try:
            found = grading.judge(pairs)
        finally:
            done.set()
            killer.join()
    assert kills
    assert [verdict == "right" for verdict in found] == [i % 2 == 0 for i in range(250)]


def test_workers_that_die_while_idle_are_replaced():
    with Grading("math", faithful=False, workers=2) as grading:
        assert grading.judge([("1", "1.0")]) == ["right"]
        for pid in _worker_pids():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)
        assert grading.judge([("2", "2.0"), ("2", "3")]) == ["right", "wrong"]


@pytest.fixture
def replace_in_workers(monkeypatch, tmp_path):
    """Puts a function of a module, given as text, in the place of one that the workers run."""

    def replace(name: str, text: str) -> None:
        module = f"replacement_of_{name}"
        (tmp_path / f"{module}.py").write_text("import os, sys\n" + text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(grading_worker, name, getattr(importlib.import_module(module), name))

    return replace


def test_a_pair_that_kills_every_worker_times_out_alone_after_a_second_try(replace_in_workers, tmp_path):
    log = tmp_path / "log"
    replace_in_workers("start", "def start(parent, memory_bytes):\n    pass\n")  # without its limit of the size of files
    replace_in_workers(
        "compare",
        f"def compare(answer, gold):\n    print(answer, file=open({str(log)!r}, 'a'), flush=True)\n"
        "    if answer == 'die':\n        os._exit(3)\n    return True\n",
    )
    with Grading("math", faithful=False, workers=2, seconds=60.0) as grading:
        assert grading.judge([("1", "2"), ("die", "2"), ("3", "2"), ("die", "3")]) == ["right", "timed out", "right", "timed out"]
    assert sorted(log.read_text().split()) == ["1", "3", "die", "die", "die", "die"]


@pytest.mark.parametrize("body", ["os._exit(7)", "raise ImportError('no math_verify')"])
def test_workers_that_cannot_start_are_one_line(replace_in_workers, body, capfd):
    replace_in_workers("start", f"def start(parent, memory_bytes):\n    sys.stderr = open(os.devnull, 'w')\n    {body}\n")
    pairs = [(str(i), "-1") for i in range(2000)]
    with Grading("math", faithful=False, workers=1) as grading, pytest.raises(UserError, match="end before they are ready") as caught:
        grading.judge(pairs)
    assert "\n" not in str(caught.value)


def test_too_little_memory_to_start_is_a_users_mistake(capfd):
    with Grading("math", faithful=False, workers=1, memory_bytes=1 << 20) as grading, pytest.raises(UserError, match="1,048,576 bytes"):
        grading.judge([("1", "2")])
    assert "Traceback" not in capfd.readouterr().err


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _blocks_interrupts(pid: int) -> bool:
    """From birth, also while Python starts, when a handler of the worker's own would not yet stand."""
    with open(f"/proc/{pid}/status") as status:
        blocked = next(line.split()[1] for line in status if line.startswith("SigBlk:"))
    return bool(int(blocked, 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("busy", [True, False])
def test_no_worker_outlives_its_parent(number, busy):
    """Nor prints a trace when Ctrl-C, which reaches all processes of the terminal, ends it."""
    program = (
        "import multiprocessing, threading, time\nfrom plasticity_jax.evaluate.grading import Grading\n"
        "with Grading('math', faithful=False, workers=1, seconds=600.0) as grading:\n"
        "    def tell():\n"
        "        while not multiprocessing.active_children(): time.sleep(0.01)\n"
        f"        time.sleep({3 * busy})\n"
        "        print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    threading.Thread(target=tell, daemon=True).start()\n"
        "    grading.judge([('9^{9^{9^{9}}}', '1')])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        worker = int(parent.stdout.readline())
        assert _is_running(worker) and _blocks_interrupts(worker)
        if number == signal.SIGINT:
            os.killpg(parent.pid, number)
        else:
            parent.send_signal(number)
        assert parent.wait(60) != 0
    finally:
        parent.kill()
    deadline = time.monotonic() + 30
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(worker)
    errors = parent.stderr.read()
    assert errors.count("KeyboardInterrupt") == (number == signal.SIGINT), errors  # the parent's own; a worker's would be a second one
    parent.stdout.close()
    parent.stderr.close()


def test_workers_import_neither_jax_nor_the_parents_script(tmp_path):
    """The script has no `__name__` guard, so a worker that imported it would start workers itself."""
    (tmp_path / "spy.py").write_text("import sys\ndef compare(answer, gold):\n    return not {'jax', 'numpy', 'tensorflow'} & set(sys.modules)\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import jax, spy\nfrom plasticity_jax.evaluate import grading, grading_worker\ngrading_worker.compare = spy.compare\n"
        "with grading.Grading('math', faithful=False, workers=1) as g:\n    print(g.judge([('1', '2')])[0])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("right\n", 0), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grader": "likelihood"}, "'likelihood' is unknown"),
        ({"grader": "math", "workers": -1}, "workers=-1"),
        ({"grader": "math", "seconds": float("nan")}, "seconds=nan"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grading(**{"faithful": False} | arguments)


PIECES = [
    "\\boxed{",
    "}",
    "{",
    "\\frac{1}{2}",
    "answer is",
    "The answer is ",
    ":",
    "A",
    "(B)",
    "c.",
    "42",
    "1,234.5",
    "-",
    ".",
    "x^2+1",
    "\\sqrt{2}",
    "\\text{",
    "$",
    "\\(",
    "\\)",
    "yes",
    "maybe",
    "\n",
    "\t",
    "\x00",
    "\x1b",
    "\ud800",
    "\udfff",
    "\ufeff",
    "é",
    "٣",
    "𝟙",
    "\\",
    "\\\\",
    "\\left(",
    "^",
    "_",
    "%",
    "#",
    "&",
    "=",
    "<",
    "9" * 50,
    " " * 40,
    "(" * 40,
    "\\sum",
    "\\int",
    "\\infty",
    "e^{",
    "!",
    "nan",
    "inf",
    "1e999999999",
]


def _fuzzed(count: int) -> list[str]:
    draw = random.Random(0)
    texts = ["".join(draw.choices(PIECES, k=draw.randrange(12))) for _ in range(count)]
    for position in range(0, count, 500):  # some are very long
        texts[position] = "answer is" + draw.choice(PIECES) * 20_000
    return texts


@pytest.mark.slow
def test_ten_thousand_fuzzed_completions_get_a_verdict_from_every_text_grader():
    texts = _fuzzed(10_000)
    answers = [extract_answer(text) for text in texts]
    assert any(answers) and any(answer is None for answer in answers)
    for grader in GRADERS[:3]:  # the others are rules of the third
        for faithful in (False, True):
            with Grading(grader, faithful=faithful) as grading:
                verdicts = grading.judge([(answer, "A") for answer in answers])
                assert len(verdicts) == 10_000 and all(isinstance(verdict, Verdict) for verdict in verdicts)
                assert all((verdict == "no answer") == (answer is None) for verdict, answer in zip(verdicts, answers))
                assert len(grading.majority([texts[i : i + 16] for i in range(0, 10_000, 16)])) == 625


@pytest.mark.slow
def test_ten_thousand_fuzzed_completions_get_a_mathematical_verdict():
    answers = [extract_answer(text) for text in _fuzzed(10_000)]
    with Grading("math", faithful=False, workers=2) as grading:
        verdicts = grading.judge([(answer, "42") for answer in answers])
    assert len(verdicts) == 10_000 and {"right", "wrong", "no answer"} <= set(verdicts)
    assert all((verdict == "no answer") == (answer is None) for verdict, answer in zip(verdicts, answers))

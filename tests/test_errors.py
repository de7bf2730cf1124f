"""Every error has a message, a hint where there is one to give, and an exit code."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from weightctl.errors import IntegrityError, NotInstalledError, UsageError, WeightctlError, translated_os_errors


def test_exit_codes() -> None:
    assert [kind.exit_code for kind in (WeightctlError, UsageError, IntegrityError)] == [1, 2, 3]
    assert NotInstalledError("bench", "torch", "torch").exit_code == 2


def test_the_message_is_what_the_exception_says() -> None:
    error = WeightctlError("it broke", "mend it")
    assert (str(error), error.message, error.hint) == ("it broke", "it broke", "mend it")


def test_a_missing_package_names_its_extra() -> None:
    error = NotInstalledError("serialize", "tensorizer", "tensorizer")
    assert "tensorizer" in error.message
    assert error.hint == "pip install 'weightctl[tensorizer]'"


def test_an_os_error_says_what_was_done_to_which_file_and_why(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(WeightctlError) as caught, translated_os_errors("read the model"):
        missing.read_bytes()
    assert caught.value.message == f"cannot read the model: No such file or directory ({missing})"
    assert caught.value.hint == "check the path"
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_file_is_named_once(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(WeightctlError) as caught, translated_os_errors(f"read {missing}"):
        missing.read_bytes()
    assert caught.value.message.count(str(missing)) == 1


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOTDIR]
)
def test_what_a_disk_can_do_to_a_user_has_a_hint(number: int) -> None:
    with pytest.raises(WeightctlError) as caught, translated_os_errors("write it"):
        raise OSError(number, os.strerror(number))
    assert caught.value.hint


def test_an_os_error_without_a_number_keeps_its_words() -> None:
    with pytest.raises(WeightctlError, match="cannot write it: out of paper"), translated_os_errors("write it"):
        raise OSError("out of paper")


def test_other_errors_pass() -> None:
    with pytest.raises(IntegrityError), translated_os_errors("read it"):
        raise IntegrityError("not what it should be")

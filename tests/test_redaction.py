"""What others may read: no credentials, and no paths of this machine."""

import pytest

from green_swin_hf.redaction import one_line, redacted, without_local_paths
from green_swin_hf.training import one_line_errors

PATHS = (
    "/home/me/cats", "~/cats", "./cats", "../../me/cats/", ".\\cats", "..\\me\\cats", "C:\\me\\cats", "d:/me/cats",
    "\\\\server\\share\\cats", "//server/share/cats", "file:///home/me/cats", "FILE://server/cats", "file:/me/cats",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_of_a_path_only_the_last_component_is_left(path):
    assert without_local_paths({"a": [path, (path,)]}) == {"a": ["cats", ["cats"]]}
    assert without_local_paths({"id2label": {"0": path}}) == {"id2label": {"0": path}}  # a name of a class


ADDRESSES = {
    "s3://key@bucket/cats": "s3://***@bucket/cats",
    "s3://key:se/cr/et@bucket/cats": "s3://***@bucket/cats",
    "https://me:pass@host:80/cats": "https://***@host:80/cats",
    "https://me:p@ss@host/cats": "https://***@host/cats",
    "https://hf_abcdefghijklmnop@huggingface.co/a/b": "https://***@huggingface.co/a/b",
    "https://host/cats?X-Amz-Signature=abc&x=1": "https://host/cats?***",
    "https://host:8080/a/b@main": "https://host:8080/a/b@main",
    "someone/hf_models": "someone/hf_models",
    "https://host/cats": "https://host/cats",
}


@pytest.mark.parametrize(("address", "shown"), ADDRESSES.items(), ids=ADDRESSES)
def test_an_address_keeps_all_but_its_credentials(address, shown):
    assert without_local_paths(address) == shown
    assert redacted(f"a {address} b") == f"a {shown} b"


def test_what_is_no_text_stays_as_it_is():
    content = {"a": [1, 2.5, None, True, "cats", "a/b", "3 cores"]}
    assert without_local_paths(content) == content


def test_errors_of_scripts_show_no_credentials(capsys):
    with pytest.raises(SystemExit, match="2"), one_line_errors("x.py"):
        raise ValueError("folder 's3://key:secret@bucket/x' does not exist;\n check the path")
    assert capsys.readouterr().err == "x.py: error: folder 's3://***@bucket/x' does not exist; check the path\n"
    assert one_line(OSError("https://a:b@c\nd")) == "https://***@c d"

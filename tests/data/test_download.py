"""A registered text is fetched when told to, and used only when it is the registered one. The server is on loopback."""

import hashlib
import io
import socket
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from meristem.data import download, sources
from meristem.data.config import DataConfig
from meristem.data.download import Registered, available, registered
from meristem.errors import DataError, FileChanged

TEXT = b"<|endoftext|>\nOne story.\n<|endoftext|>\nAnother,\xe2\x80\xa8longer.\n" * 3000


def archive():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("a.raw", " \n = One = \n words \n = = part = = \n more \n = Two = \n end \n")
        file.writestr("b.raw", " = Three = \n")
    return content.getvalue()


SERVED = {"/good.txt": TEXT, "/good.zip": archive(), "/wrong.txt": TEXT[:-1] + b"?", "/long.txt": TEXT + b"more"}


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        body = SERVED.get(self.path, TEXT[: len(TEXT) // 2] if self.path == "/torn.txt" else None)
        if body is None:
            self.send_error(404, "Not here")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(TEXT) if self.path == "/torn.txt" else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def entry(url, content=TEXT, **settings):
    return Registered(
        url=url,
        file=url.rpartition("/")[2],
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="CC0",
        **settings,
    )


def told(tmp_path, **settings):
    return DataConfig(root=tmp_path, download=True, **settings)


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "downloads").iterdir())


def test_a_good_file_arrives_whole_with_its_progress(server, tmp_path):
    events, seen = [], []
    path = available(
        told(tmp_path),
        "good",
        entry(f"{server}/good.txt"),
        events.append,
        lambda done, total: seen.append((done, total)),
    )
    assert path.read_bytes() == TEXT
    assert kept(tmp_path) == ["good.txt"]
    assert seen[-1] == (len(TEXT), len(TEXT)) and seen == sorted(seen)
    assert [event.name for event in events] == ["data.download"]


def test_a_file_that_is_here_is_not_fetched_again(server, tmp_path):
    there = available(told(tmp_path), "good", entry(f"{server}/good.txt"))
    before = there.stat()
    again = available(DataConfig(root=tmp_path), "good", entry(f"{server}/good.txt"))
    assert (again, again.stat().st_mtime_ns) == (there, before.st_mtime_ns)


def test_nothing_is_fetched_unless_told(server, tmp_path):
    with pytest.raises(DataError, match=r"'good' \(.* CC0\) is not at .*data.source=good data.download=true"):
        available(DataConfig(root=tmp_path), "good", entry(f"{server}/good.txt"))
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "name, message",
    [
        ("wrong.txt", "its SHA-256 is .* registered is"),
        ("torn.txt", f"{len(TEXT) // 2} bytes came, {len(TEXT)} were expected|IncompleteRead"),
        ("long.txt", f"{len(TEXT) + 4} bytes came, {len(TEXT)} were expected"),
        ("none.txt", "the server returned 404 Not here"),
    ],
)
def test_another_file_is_refused_and_nothing_kept(server, tmp_path, name, message):
    with pytest.raises(DataError, match=rf"cannot fetch .*{name}: ({message}).*Nothing was saved"):
        available(told(tmp_path), "x", entry(f"{server}/{name}"))
    assert kept(tmp_path) == []


def test_a_refused_connection_is_named(tmp_path):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/x.txt"
        with pytest.raises(DataError, match="cannot fetch .*Connection refused"):
            available(told(tmp_path), "x", entry(url))
    assert kept(tmp_path) == []


def test_a_reader_that_gives_up_leaves_nothing(server, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        available(told(tmp_path), "good", entry(f"{server}/good.txt"), progress=stop)
    assert kept(tmp_path) == []


def test_a_mirror_serves_instead(server, tmp_path):
    elsewhere = entry("http://nowhere.invalid/good.txt")
    assert available(told(tmp_path, mirror=server + "/"), "good", elsewhere).read_bytes() == TEXT


def test_a_kept_file_that_changed_is_refused(server, tmp_path):
    path = available(told(tmp_path), "good", entry(f"{server}/good.txt"))
    content = bytearray(TEXT)
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileChanged, match=r"good.txt has SHA-256 .* Remove the file"):
        available(DataConfig(root=tmp_path), "good", entry(f"{server}/good.txt"))


def read(monkeypatch, tmp_path, made):
    monkeypatch.setattr(download, "registered", lambda: {"mine": made})
    monkeypatch.setattr(sources, "registered", lambda: {"mine": made})
    return list(sources.documents(told(tmp_path, source="mine")))


def test_stories_are_documents_and_lines_end_at_line_feeds_only(server, tmp_path, monkeypatch):
    found = read(monkeypatch, tmp_path, entry(f"{server}/good.txt", starts=r"^<\|endoftext\|>"))
    assert len(found) == 6000
    assert found[1].text == b"<|endoftext|>\nAnother,\xe2\x80\xa8longer.\n"
    assert b"".join(document.text for document in found) == TEXT
    assert len({document.id for document in found}) == 6000


def test_an_archive_gives_the_articles_of_its_members(server, tmp_path, monkeypatch):
    made = entry(
        f"{server}/good.zip", SERVED["/good.zip"], members=("a.raw", "b.raw"), starts=registered()["wikitext-2"].starts
    )
    assert [(document.id, document.text.split(b"\n")[0]) for document in read(monkeypatch, tmp_path, made)] == [
        ("a.raw#0", b" "),
        ("a.raw#1", b" = One = "),
        ("a.raw#2", b" = Two = "),
        ("b.raw#0", b" = Three = "),
    ]


def test_the_registered_texts_are_well_described():
    assert {"shakespeare", "enwik8", "tinystories", "wikitext-2"} <= set(registered())
    assert registered()["shakespeare"].size_bytes == 1_115_394
    assert len({made.file for made in registered().values()}) == len(registered())

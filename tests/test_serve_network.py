"""What a stranger can do with connections and headers, against a real server."""

import asyncio
import contextlib
import http.client
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from mdpd_deploy import load_bundle
from mdpd_deploy.cli import main
from mdpd_deploy.errors import UserError

pytest.importorskip("starlette", reason="serves over HTTP")
pytest.importorskip("onnxruntime", reason="runs exported graphs")

PROGRAM = """
import resource, sys
most = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
from mdpd_deploy import load_bundle
from mdpd_deploy.cli import main
sys.exit(main(["serve", "--port", "0", *sys.argv[1:]]))
"""
PREDICT, CLASSIFY = "/v1/models/films/predict", "/v1/models/digits/classify"
INFER = "/v2/models/films/infer"
JSON = {"Content-Type": "application/json"}
ASKED = json.dumps({"inputs": ["a good film"]}).encode()


class Server:
    """A running `mdpd serve`, with so many file descriptors at most."""

    def __init__(self, *words, descriptors=512):
        command = [sys.executable, "-c", PROGRAM, str(descriptors), *map(str, words)]
        self.process = subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        found = re.search(r":(\d+)$", self.process.stdout.readline().strip())
        assert found, self.process.stderr.read()
        self.port = int(found[1])

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(self, method, path, body=None, headers=(), source="127.0.0.1"):
        """Return status, headers and body."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=20, source_address=(source, 0)
        )
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()

    def post(self, path, body, **headers):
        """Return the status and the error's sentence, or the predictions."""
        status, _, raw = self.ask("POST", path, body, headers)
        return status, json.loads(raw).get("error", "")

    def end(self, how=signal.SIGTERM):
        """Return the exit code and what was said on stderr."""
        self.process.send_signal(how)
        try:
            _, errors = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def server(tiny_bundle, tiny_text_bundle):
    words = ("--allow-host", "models.example", "--allow-host", "*.cluster.local")
    running = Server(tiny_bundle.path, tiny_text_bundle.path, *words)
    yield running
    assert running.end() == (0, "")  # strangers write nothing into the log


@pytest.fixture(scope="module")
def narrow(tiny_text_bundle):
    """A server of 64 descriptors whose requests, and so their heads, have one second."""
    running = Server(tiny_text_bundle.path, "--timeout-s", 1, descriptors=64)
    yield running
    code, errors = running.end()
    warned = "no connection can be accepted (Too many open files): trying again.\n"
    assert code == 0 and errors in ("", warned), errors[:2000]


def closes(line, within=15):
    """Whether the server ends a connection in time, whatever it sends before."""
    line.settimeout(within)
    end = time.monotonic() + within
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < end:
            if not line.recv(65536):
                return True
        return False
    return True


def wait_until(true, within=20):
    """Wait for what the server does a moment later; connections may break meanwhile."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        with contextlib.suppress(ConnectionError):
            if true():
                return
        time.sleep(0.05)
    raise AssertionError(f"not so within {within} s")


def exchange(server, raw):
    """Send bytes on a connection of their own; return all that comes back until its end."""
    with server.connect() as line:
        line.sendall(raw)
        line.shutdown(socket.SHUT_WR)
        found = b""
        while part := line.recv(65536):
            found += part
    return found.decode()


# Speed


def test_a_kept_connection_does_not_wait_for_delayed_acknowledgements(server):
    """Without TCP_NODELAY every answer takes 40 ms: two writes, the second held for the ACK."""
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    times = []
    with contextlib.closing(line):
        for _ in range(60):
            started = time.perf_counter()
            line.request("GET", "/v2/health/live")
            line.getresponse().read()
            times.append(time.perf_counter() - started)
    assert min(times[30:]) < 0.025  # a new connection's first answers are acknowledged at once


def test_an_answer_comes_in_one_piece(server):
    """Two writes would wake its client twice, mostly for a head alone."""
    asked = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(ASKED)}\r\n\r\n"
    with server.connect() as line:
        for _ in range(30):
            line.sendall(asked.encode() + ASKED)
            assert line.recv(65536).endswith(b"}")


# Connections


def test_idle_connections_leave_room_and_no_log(narrow):
    with contextlib.ExitStack() as stack:
        for _ in range(120):
            stack.enter_context(narrow.connect())
        for _ in range(3):
            assert narrow.post(PREDICT, ASKED, **JSON) == (200, "")


def test_without_descriptors_it_waits_and_says_so_once(narrow):
    """What else takes them, the server cannot know; its own limits leave some."""
    pid = narrow.process.pid
    with narrow.connect() as line:
        line.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in line.recv(4096)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, 64))
        try:
            with narrow.connect() as waiting:
                waiting.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
                time.sleep(2.5)  # two tries
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (64, 64))
                assert b"200 OK" in waiting.recv(4096)
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (64, 64))


def test_too_few_descriptors_are_told_at_the_start(tiny_text_bundle):
    command = [sys.executable, "-c", PROGRAM, "30", str(tiny_text_bundle.path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert "this process may open 30 files" in done.stderr and done.stderr.count("\n") == 1


def test_busy_connections_of_one_client_leave_room_for_others(narrow):
    """Those that have a request in progress cannot be ended for others: one more gets a 503."""
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{{".encode()

    def crowded():
        with contextlib.ExitStack() as stack:
            lines = [stack.enter_context(narrow.connect()) for _ in range(60)]
            for line in lines:
                with contextlib.suppress(ConnectionError):
                    line.sendall(head)
            assert narrow.ask("GET", "/v2/health/live", source="127.0.0.2")[0] == 200
            status, headers, raw = narrow.ask("GET", "/v2/health/live")
            if status == 200:
                return False  # the second in which they must send more was over
            assert (status, headers["Retry-After"]) == (503, "1")
            return "too many connections" in json.loads(raw)["error"]

    wait_until(crowded)
    wait_until(lambda: narrow.ask("GET", "/v2/health/live")[0] == 200)


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX: ",
        b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v2",
    ],
)
def test_a_connection_that_does_not_ask_in_time_is_closed(narrow, begun):
    """However slowly it goes on, also behind an answer."""
    with narrow.connect() as line:
        line.sendall(begun)
        stop = threading.Event()

        def trickle():
            with contextlib.suppress(OSError):
                while begun and not stop.wait(0.1):
                    line.send(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert closes(line)
        finally:
            stop.set()
            thread.join()


def test_a_client_that_reads_no_answer_is_let_go(narrow):
    asked = 20 * b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # soon full
        line.connect(("127.0.0.1", narrow.port))
        line.settimeout(0.2)

        def let_go():
            try:
                line.send(asked)
            except TimeoutError:  # the server reads no further either
                return False
            except ConnectionError:
                return True
            return False

        wait_until(let_go, within=60)


def test_one_client_cannot_hold_the_room_for_bodies():
    from starlette.requests import Request

    from mdpd_deploy.serve.core.options import Limits
    from mdpd_deploy.serve.core.refusal import Refusal
    from mdpd_deploy.serve.web.body import Bodies

    bodies = Bodies(Limits(bodies_bytes=1000), timeout_s=5)

    def request(client, size):
        async def receive():
            return {"type": "http.request", "body": bytes(size), "more_body": False}

        scope = {"type": "http", "method": "POST", "headers": [], "client": (client, 1)}
        return Request(scope, receive)

    async def work():
        async with bodies.read(request("192.0.2.1", 400)):
            with pytest.raises(Refusal, match="your address") as stop:
                async with bodies.read(request("192.0.2.1", 200)):
                    pass
            assert stop.value.status == 503
            async with bodies.read(request("192.0.2.2", 400)):
                with pytest.raises(Refusal, match="too many bodies"):
                    async with bodies.read(request("192.0.2.3", 300)):
                        pass
        async with bodies.read(request("192.0.2.1", 500)) as body:
            assert len(body) == 500
        assert bodies.held == 0

    asyncio.run(work())


def test_clients_are_told_apart_by_what_one_of_them_can_have():
    from mdpd_deploy.serve.web.callers import client_of

    assert client_of(("192.0.2.1", 5)) == client_of(("::ffff:192.0.2.1", 6, 0, 0)) == "192.0.2.1"
    assert client_of(("2001:db8::1", 5, 0, 0)) == client_of(("2001:db8::ffff:1", 6, 0, 0))
    assert client_of(("2001:db8::1", 5, 0, 0)) != client_of(("2001:db8:0:1::1", 5, 0, 0))
    assert client_of(None) == client_of(("testclient", 1)) == "unknown"


# Headers


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "localhost:8000", "LOCALHOST.:80", "127.0.0.1", "127.0.0.1:99", "192.0.2.7:1",
        "[::1]", "[::1]:8000", "models.example", "Models.Example:443", "a.b.cluster.local",
    ],
)  # fmt: skip
def test_hosts_that_are_answered(server, host):
    assert server.ask("GET", "/v2", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
        "models.example.evil", "xmodels.example", "cluster.local", "evil@localhost", "[::1",
        "[evil.example]", "localhost:8000:x", "", "a, localhost", "*.cluster.local", "2130706433",
    ],
)  # fmt: skip
def test_a_foreign_host_is_refused(server, host):
    """A page of another site whose name was made to lead here can read nothing."""
    for path in ("/", "/v2", "/metrics", "/nothing"):
        status, _, raw = server.ask("GET", path, headers={"Host": host})
        assert status == 421 and "--allow-host" in json.loads(raw)["error"], raw
    assert server.post(PREDICT, ASKED, Host=host, **JSON)[0] == 421


def test_the_name_that_a_server_listens_on_is_its_own():
    from mdpd_deploy.serve.core.options import CoreOptions
    from mdpd_deploy.serve.web.callers import called_by

    options = CoreOptions(allow_hosts=("a.example",))
    assert called_by(options, "host.example").allow_hosts == ("a.example", "host.example")
    assert called_by(options, "::") == called_by(options, "0.0.0.0") == options


def test_a_request_without_a_host_is_a_programs(server):
    assert "200 OK" in exchange(server, b"GET /v2/health/live HTTP/1.0\r\n\r\n")
    assert " 400 " in exchange(server, b"GET /v2 HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1"},
    ],
)
def test_a_page_of_another_site_cannot_post(server, headers):
    for kind in ("text/plain", "application/json"):
        status, words = server.post(PREDICT, ASKED, **{"Content-Type": kind, **headers})
        assert status == 403 and "another site" in words


def test_the_servers_own_page_can_post(server):
    own = f"127.0.0.1:{server.port}"
    for headers in ({"Origin": f"http://{own}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert server.post(PREDICT, ASKED, **JSON, **headers) == (200, "")


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        (PREDICT, "application/json", 200), (PREDICT, "Application/JSON; charset=utf-8", 200),
        (PREDICT, None, 200), (PREDICT, FORM, 200),  # what http.client and curl say by themselves
        (PREDICT, "text/plain", 415), (PREDICT, "multipart/form-data; boundary=x", 415),
        (PREDICT, "image/png", 415), (PREDICT, "text/plain; application/json", 415),
        (INFER, "application/octet-stream", 400), (INFER, "application/json", 400),
        (INFER, "text/plain", 415), (CLASSIFY, "image/png", 400), (CLASSIFY, None, 400),
        (CLASSIFY, "application/octet-stream", 400), (CLASSIFY, "application/json", 415),
        (CLASSIFY, "text/plain;charset=UTF-8", 415), (CLASSIFY, "multipart/form-data", 415),
    ],
)  # fmt: skip
def test_what_a_body_must_say_it_is(server, path, kind, status):
    """A 400 here means that the body was read, and was none of the kind."""
    headers = {} if kind is None else {"Content-Type": kind}
    found, words = server.post(path, ASKED, **headers)
    assert found == status
    assert status != 415 or "Content-Type" in words or "not as a form" in words


def test_a_browser_must_say_what_it_sends(server):
    """A page may send a form, or bytes of no type, to any site without asking it first."""
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert server.post(PREDICT, ASKED, **own)[0] == 415
    assert server.post(PREDICT, ASKED, **own, **{"Content-Type": FORM})[0] == 415


def test_two_lengths_of_one_body_are_refused_and_the_connection_ends(server):
    """Otherwise a proxy in front and this server may see two requests where there is one."""
    raw = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    raw += "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    found = exchange(server, (raw + "GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n").encode())
    assert found.count("HTTP/1.1 ") == 1 and " 400 " in found.splitlines()[0]
    assert "connection: close" in found.lower() and "Transfer-Encoding" in found


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/digits",
        "/v2/models/digits/versions/1/ready", "/v1/models", "/v1/models/digits", "/v1/queue",
    ],
)  # fmt: skip
def test_head_is_get_without_a_body(server, path):
    status, headers, body = server.ask("GET", path)
    assert server.ask("HEAD", path)[::2] == (status, b"") == (200, b"")
    assert int(server.ask("HEAD", path)[1]["content-length"]) == len(body) > 0
    assert headers["content-type"] == server.ask("HEAD", path)[1]["content-type"]
    status, headers, _ = server.ask("POST", path)
    assert status == 405 and set(headers["Allow"].split(", ")) == {"GET", "HEAD"}


def test_what_is_no_http_is_answered_in_our_form_and_counted(server):
    def counted():
        text = server.ask("GET", "/metrics")[2].decode()
        return sum(
            map(
                float, re.findall(r'^mdpd_errors_total\{kind="no_http"\} (\S+)', text, re.MULTILINE)
            )
        )

    before = counted()
    chunked = "POST /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    for raw in ("\0\0\r\n\r\n", "GET / HTTP/9\r\n\r\n", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n"):
        found = exchange(server, raw.encode())
        assert found.startswith("HTTP/1.1 400") and '{"error":"' in found
        assert "x-content-type-options: nosniff" in found.lower()
    assert counted() == before + 3
    with server.connect() as line:  # damaged only after the answer has begun
        line.sendall(chunked.encode() + b"1\r\nx\r\n")
        assert b"404" in line.recv(4096)
        line.sendall(b"no size\r\n")
        assert closes(line)
    exchange(
        server,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    )


# Numbers

HUGE = "1" + "0" * 400
IDS = ("input_ids", "attention_mask", "token_type_ids")


def infer(number, *, first="[1, 1]", data="[1]", more=""):
    """A sound request of the protocol but for one number."""
    entries = [
        f'{{"name": "{name}", "datatype": "INT64", "shape": {first if name == IDS[0] else "[1, 1]"}, '
        f'"data": {data if name == IDS[0] else "[1]"}}}'
        for name in IDS
    ]
    return f'{{"inputs": [{", ".join(entries)}]{more}}}'.replace("NUMBER", number)


NUMBERS = {
    "nothing": lambda number: infer(number),
    "shape": lambda number: infer(number, first="[1, NUMBER]"),
    "shape of a fixed axis": lambda number: infer(number, first="[NUMBER, 1]"),
    "data": lambda number: infer(number, data="[NUMBER]"),
    "size": lambda number: infer(number, data='[1], "parameters": {"binary_data_size": NUMBER}'),
    "timeout": lambda number: infer(number, more=', "parameters": {"timeout": NUMBER}'),
    "priority": lambda number: infer(number, more=', "parameters": {"priority": NUMBER}'),
    "id": lambda number: infer(number, more=', "id": NUMBER'),
    "top": lambda number: f'{{"inputs": ["a"], "top": {number}}}',
    "text": lambda number: f'{{"inputs": [{number}]}}',
    "task": lambda number: f'{{"inputs": ["a"], "task": {number}}}',
    "pixels": lambda number: (
        '{"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 16, 16], "data": ['
        + "0, " * 767
        + f"{number}]}}]}}"
    ),
}


@pytest.mark.parametrize("where", [name for name in NUMBERS if name != "nothing"])
def test_no_number_is_too_large_to_be_refused(server, where):
    path = PREDICT if where in ("top", "text", "task") else INFER
    path = INFER.replace("films", "digits") if where == "pixels" else path
    assert server.post(INFER, NUMBERS["nothing"]("").encode(), **JSON) == (200, "")
    for number in (HUGE, f"-{HUGE}", "9" * 4300, "1e400", "NaN", "-Infinity"):
        status, words = server.post(path, NUMBERS[where](number).encode(), **JSON)
        assert status in (400, 413) and 0 < len(words) < 300, (number[:9], status, words)


@pytest.mark.parametrize("option", ["timeout-s", "max-delay-ms", "threads", "queue", "drain-s"])
def test_numbers_of_options_have_an_end(option, tmp_path, capsys):
    for value in ("nan", "inf", "1e300", "9" * 400):
        assert main(["serve", str(tmp_path), f"--{option}={value}"]) == 2
        said = capsys.readouterr().err
        assert f"--{option}" in said and "Traceback" not in said and len(said) < 700


def test_a_host_that_is_no_name(tmp_path, capsys):
    for value in ("http://models.example", "models.example:80", "", "a/b"):
        assert main(["serve", str(tmp_path), "--allow-host", value]) == 2
        assert "give a name alone, without scheme and port" in capsys.readouterr().err


@pytest.mark.parametrize("value", [HUGE, "-1", "nan", "1e9", "٣"])
def test_numbers_in_headers_and_paths(server, value):
    with contextlib.suppress(UnicodeEncodeError):
        status = server.post(INFER, ASKED, **{"Inference-Header-Content-Length": value})[0]
        assert status == 400
    quoted = value.encode().hex(" ").replace(" ", "%")
    status, _, _ = server.ask(
        "POST", f"{CLASSIFY}?top=%{quoted}", b"x", {"Content-Type": "image/png"}
    )
    assert status == 400


def test_empty_texts_are_refused_as_everywhere(server, tiny_text_bundle):
    with pytest.raises(UserError, match="a text to predict is empty"):
        load_bundle(tiny_text_bundle.path).predict(["a", " "])
    for text in ("", " \n\t", "\u3000"):
        status, words = server.post(PREDICT, json.dumps({"inputs": ["a", text]}).encode(), **JSON)
        assert status == 400 and "empty" in words


# Start and end


def test_two_servers_on_one_port(server):
    from mdpd_deploy.serve.web.listener import bind

    port = server.port
    with pytest.raises(UserError, match=f"--port {port} is in use: choose another one"):
        bind("127.0.0.1", port)
    with bind("127.0.0.1", 0) as first:  # which has not begun to accept
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is in use: choose another one"):
            bind("127.0.0.1", port)


def test_hanging_up_drains_as_termination_does(tiny_text_bundle):
    running = Server(tiny_text_bundle.path, "--max-delay-ms", 1500, "--max-batch", 8)
    with running.connect() as line:
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(ASKED)}\r\n\r\n"
        line.sendall(head.encode() + ASKED)
        while b'films"} 1.0' not in running.ask("GET", "/metrics")[2]:
            assert running.process.poll() is None
        running.process.send_signal(signal.SIGHUP)
        assert line.recv(65536).startswith(b"HTTP/1.1 200 OK")
    assert running.end(signal.SIGHUP) == (0, "")


def test_hanging_up_is_ignored_where_nohup_says_so():
    from mdpd_deploy.serve.web.run import hanging_up

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with hanging_up(lambda number, frame: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with hanging_up(lambda number, frame: None):
            assert callable(signal.getsignal(signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)

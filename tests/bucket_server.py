"""A bucket of Google Cloud Storage in memory: as much of its JSON API as gcsfs, TensorStore and Orbax use.

Generations and their preconditions are the real thing's, since TensorStore relies on them: two writers of one object.
"""

import base64
import email
import hashlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_OBJECT = re.compile(
    r"(?:/download)?/storage/v1/b/[^/]+(?:/o(?:/([^/]+)(?:/(?:rewriteTo/b/[^/]+|moveTo)/o/([^/]+))?)?)?/?"
)


class BucketServer(ThreadingHTTPServer):
    """Serves one bucket on a free port of this machine; `objects` is {name: (generation, bytes)}."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("localhost", 0), _Handler)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.lock = threading.Lock()
        self.generations = itertools.count(1)
        self.url = f"http://localhost:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BucketServer

    def log_message(self, *_):
        pass

    def _route(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with self.server.lock:
            status, headers, content = self._answer(self.command, parts.path, query, body)
        if isinstance(content, dict):
            headers, content = {"Content-Type": "application/json", **headers}, json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_DELETE = do_PUT = _route

    def _answer(self, method, path, query, body):
        objects = self.server.objects
        if "/b/" in path and not path.partition("/b/")[2].startswith("bucket"):
            return 404, {}, {"error": {"code": 404, "message": "The specified bucket does not exist."}}
        if path.startswith("/batch/"):
            return self._batch(body)
        if "upload_id" in query:
            return self._go_on(query["upload_id"], body)
        if path.startswith("/upload/"):
            name = query.get("name")
            if query["uploadType"] == "resumable":
                key = str(len(self.server.uploads))
                self.server.uploads[key] = (name or json.loads(body)["name"], b"")
                return 200, {"Location": f"{self.server.url}/upload?upload_id={key}"}, b""
            if query["uploadType"] == "multipart":
                head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
                message = email.message_from_bytes(head + body)
                about = json.loads(message.get_payload()[0].get_payload())
                boundary = b"--" + message.get_boundary().encode()
                body = body.split(boundary)[2].partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
                name = about["name"]
            return self._refused(name, query) or self._put(name, body)
        match = _OBJECT.fullmatch(path)
        if match is None:
            return 404, {}, {"error": {"code": 404, "message": path}}
        name, target = (unquote(part) if part else None for part in match.groups())
        if name is None:
            return (200, {}, self._list(query)) if "/o" in path.partition("/b/")[2] else (200, {}, {"name": "bucket"})
        if name not in objects:
            return 404, {}, {"error": {"code": 404, "message": f"no object {name}"}}
        if target:
            status, headers, resource = self._put(target, objects[name][1])
            if "/rewriteTo/" in path:
                return status, headers, {"done": True, "resource": resource}
            del objects[name]
            return status, headers, resource
        if refusal := self._refused(name, query):
            return refusal
        if method == "DELETE":
            del objects[name]
            return 204, {}, b""
        generation, data = objects[name]
        if query.get("alt") != "media":
            return 200, {}, self._resource(name)
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            if first >= len(data):
                return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return 206, headers, data[first : last + 1]
        return 200, headers, data

    def _go_on(self, key, body):
        name, before = self.server.uploads[key]
        self.server.uploads[key] = (name, before + body)
        if self.headers["Content-Range"].endswith("/*"):
            return 308, {"Range": f"bytes=0-{len(before + body) - 1}"}, b""
        return self._put(name, before + body)

    def _refused(self, name, query):
        generation = self.server.objects.get(name, (0, b""))[0]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return 412, {}, {"error": {"code": 412, "message": "conditionNotMet"}}
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            return 304, {}, b""
        return None

    def _put(self, name, data):
        self.server.objects[name] = next(self.server.generations), data
        return 200, {}, self._resource(name)

    def _resource(self, name):
        generation, data = self.server.objects[name]
        checksum = base64.b64encode(hashlib.md5(data).digest()).decode()
        time = "2026-01-01T00:00:00.000Z"
        return {"kind": "storage#object", "name": name, "bucket": "bucket", "generation": str(generation),
                "metageneration": "1", "size": str(len(data)), "md5Hash": checksum, "etag": str(generation),
                "id": f"bucket/{name}", "timeCreated": time, "updated": time}  # fmt: skip

    def _list(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        items, prefixes = [], set()
        for name in sorted(self.server.objects):
            if not name.startswith(prefix) or not start <= name < end:
                continue
            inner, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                prefixes.add(prefix + inner + delimiter)
            else:
                items.append(self._resource(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _batch(self, body):
        answers = []
        for number, path in enumerate(re.findall(rb"DELETE ([^ \r\n]+)", body), 1):
            status, _, _ = self._answer("DELETE", urlsplit(path.decode()).path, {}, b"")
            answers.append(
                f"--part\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status} {'No Content' if status == 204 else 'Not Found'}\r\n\r\n\r\n"
            )
        return 200, {"Content-Type": "multipart/mixed; boundary=part"}, ("".join(answers) + "--part--\r\n").encode()

"""A server that speaks the OpenAI protocol and misbehaves on command; a process of its own: python llm_server.py

Prints its port. POST /moods with a list of moods for the next answers; GET /seen tells how often each question came and
how many were under way at once at most. Moods: well, 429, 429-date, 500, 401, 400, cut, html, prose, half, wrong, empty, slow."""
import hashlib, json, re, sys, threading, time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

moods, seen, lock = [], {}, threading.Lock()
state = {"now": 0, "most": 0}


def labels(text, fields):
    "present where the report names a finding, absent where it says no before it."
    report, listed = text.split("\n\nFindings:\n")
    names = dict(line.split(": ", 1) for line in listed.splitlines())
    out = {}
    for i in fields:
        m = re.search(rf"(no )?{re.escape(names[i].lower())}", report.lower())
        out[i] = "not stated" if not m else "absent" if m[1] else "present"
    return out


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for k, v in headers: self.send_header(k, v)
        self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)

    def do_GET(self): self.answer(200, json.dumps({"seen": seen, **state, "left": moods}).encode())

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/moods":
            with lock: moods[:] = json.loads(raw)
            return self.answer(200, b"{}")
        body = json.loads(raw)
        with lock:
            mood = moods.pop(0) if moods else "well"
            state["now"] += 1; state["most"] = max(state["most"], state["now"])
            key = hashlib.sha256(body["messages"][1]["content"].encode()).hexdigest()[:12]
            seen[key] = seen.get(key, 0) + 1
        try: self.reply(mood, body)
        except OSError: pass                                   # the client has left
        finally:
            with lock: state["now"] -= 1

    def reply(self, mood, body):
        said = body["messages"][1]["content"].encode()         # a careless server quotes the report in its errors
        if mood == "429": return self.answer(429, said, [("Retry-After", "0.4")])
        if mood == "429-date": return self.answer(429, said, [("Retry-After", formatdate(time.time() + 1, usegmt=True))])
        if mood.isdigit(): return self.answer(int(mood), said)
        if mood == "html": return self.answer(200, b"<html>proxy</html>")
        if mood == "slow": time.sleep(2)
        if mood == "busy": time.sleep(0.03)
        fields = body["response_format"]["json_schema"]["schema"]["properties"]
        if list(fields) == ["report"]: content = json.dumps({"report": body["messages"][1]["content"].replace("links", "left").replace("FALSIFY 3", "9")})
        else: content = json.dumps(labels(body["messages"][1]["content"], fields))
        content = {"prose": "I would say yes.", "half": content[:9], "wrong": json.dumps({i: "maybe" for i in fields}), "empty": None}.get(mood, content)
        out = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}], "usage": {"total_tokens": 10}}).encode()
        if mood == "cut":
            self.send_response(200); self.send_header("Content-Length", str(len(out))); self.end_headers()
            self.wfile.write(out[:20]); self.wfile.flush(); self.close_connection = True
            return self.connection.close()
        self.answer(200, out)

    def log_message(self, *args): pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start() # ends with its parent
    server.serve_forever()

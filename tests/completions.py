"""A tiny OpenAI-compatible server: completions of a model, greedily and with log-probabilities, in its thread."""

import json
from http.server import BaseHTTPRequestHandler

import torch

from dense_formula import formula_at, inside, logits
from threaded_server import ThreadedServer

#: How servers give tokens: vLLM by their ids, llama.cpp in a form of its own, others as text, and some none at all.
FORMS = ("ids", "content", "texts", "none")


class Completions(ThreadedServer):
    """Serves ``model`` as "base", and what ``steered`` says.

    Args:
        steered: told a request's body: (plan, alpha, scope) of what the formula does to it, or None.
        form: one of ``FORMS``. "texts" takes prompts as text alone, and refuses options that OpenAI has not.
    """

    def __init__(self, model, tokenizer, steered, form="ids"):
        self.model, self.tokenizer, self.steered, self.form = model, tokenizer, steered, form
        self.bodies = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            server_version, sys_version = "tiny/1", ""

            def do_GET(self):
                rows = [{"id": "kind", "parent": "base"}, {"id": "base", "parent": None}]
                self.answer(*{"/v1/models": (200, {"data": rows})}.get(self.path, (404, {"detail": "Not Found"})))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                self.answer(*outer.complete(body))

            def answer(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        super().__init__(Handler)

    def complete(self, body):
        """Status and answer."""
        ids = body["prompt"]
        if self.form == "texts":
            if not isinstance(ids, str) or "repetition_penalty" in body:
                return 400, {"error": {"message": "prompt: expected a string"}}
            ids = self.tokenizer(ids)["input_ids"]
        if body["model"] not in ("base", "kind"):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        steps = self.written(ids, body)
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(steps)}
        return 200, {"choices": [{"logprobs": self.told(steps)}], "usage": usage, "system_fingerprint": "tiny-0"}

    def written(self, ids, body):
        """At each step the likeliest tokens with log p, by running the whole text anew."""
        case = self.steered(body)
        row, steps = list(ids), []
        for _ in range(body["max_tokens"]):
            batch = {"input_ids": torch.tensor([row])}
            if case is None:
                found = logits(self.model, batch)
            else:
                plan, alpha, scope = case
                where = inside(scope, torch.ones_like(batch["input_ids"]), len(ids))
                with formula_at(self.model, plan, alpha, where):
                    found = logits(self.model, batch)
            best = found[0, -1].double().log_softmax(-1).topk(body["logprobs"])
            steps.append(dict(zip(best.indices.tolist(), best.values.tolist())))
            row.append(next(iter(steps[-1])))
        return steps

    def told(self, steps):
        """The steps in a server's form."""
        if self.form == "none":
            return None
        if self.form == "content":
            rows = [
                [{"id": i, "token": self.tokenizer.decode([i]), "logprob": lp} for i, lp in s.items()] for s in steps
            ]
            return {"content": [{**row[0], "top_logprobs": row} for row in rows]}
        name = (lambda i: f"token_id:{i}") if self.form == "ids" else (lambda i: self.tokenizer.decode([i]))
        return {
            "tokens": [name(next(iter(step))) for step in steps],
            "token_logprobs": [next(iter(step.values())) for step in steps],
            "top_logprobs": [{name(i): lp for i, lp in step.items()} for step in steps],
        }

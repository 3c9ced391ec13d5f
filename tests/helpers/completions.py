"""A real model behind the part of OpenAI's completions API that lm-eval uses, in a thread of this process."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


def serving(folder, name="served"):
    """Context manager: URL of a server of the checkpoint in this folder, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tenp_dist  # noqa: F401 ragged folders too

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return _running(_handler(model, AutoTokenizer.from_pretrained(folder), name, threading.Lock()))


@contextlib.contextmanager
def _running(handler):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def _handler(model, tokenizer, name, lock):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._answer({"data": [{"id": name, "max_model_len": 512}]} if self.path == "/v1/models" else None)

        def do_POST(self):
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions" or wanted["model"] != name:
                return self._answer(None)
            choice = _scored if wanted.get("echo") else _generated
            with lock:
                choices = [choice(model, tokenizer, prompt, wanted) for prompt in wanted["prompt"]]
            return self._answer({"choices": [{"index": index, **one} for index, one in enumerate(choices)]})

        def _answer(self, value):
            body = json.dumps(value or {}).encode()
            self.send_response(200 if value else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            """Quiet."""

    return Handler


@torch.no_grad()
def _scored(model, tokenizer, prompt, wanted):
    """Log-probability of every token of the prompt but its first, and of one more that lm-eval leaves out."""
    logits_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    best_T = logits_TV.max(-1).values.tolist()
    own = [logits_TV[place, token].item() for place, token in enumerate(prompt[1:])]
    return {
        "text": "",
        "logprobs": {
            "token_logprobs": [None, *own, best_T[-1]],
            "top_logprobs": [None, *({"best": value} for value in best_T)],
        },
    }


@torch.no_grad()
def _generated(model, tokenizer, prompt, wanted):
    prompt_1T = torch.tensor([prompt])
    made = model.generate(
        prompt_1T,
        attention_mask=torch.ones_like(prompt_1T),
        max_new_tokens=wanted["max_tokens"],
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)
    for stop in wanted["stop"]:
        text = text.partition(stop)[0] if stop else text
    return {"text": text}

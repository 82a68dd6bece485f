"""Run by test_export.py where nothing of this project can be imported: what a folder with its own code computes.

    python -I remote_worker.py <folder> <request.pt> <answer.pt> [without-triton]

The request holds "tokens" [T] and "new", the number of tokens to generate.
"""

import sys


class Hidden:
    """Finds none of these packages, installed or not."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden)", name=name)


hidden = {"moba", "train", "conf", "data", "evals", "launch"} | ({"triton"} if "without-triton" in sys.argv else set())
sys.meta_path.insert(0, Hidden(hidden))

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

folder, request, answer = sys.argv[1:4]
request = torch.load(request)
tokens, new = request["tokens"][None], request["new"]
result = {}


def refusal(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
module = sys.modules[type(model).__module__]
result["class"], result["triton"] = type(model).__name__, module.triton is not None
half = tokens.shape[1] // 2
with torch.no_grad():
    result["sparse"] = model(tokens).logits[0]
    result["greedy"] = model.generate(tokens, max_new_tokens=new, do_sample=False, eos_token_id=-1)[0, -new:]
    mask = torch.ones(2, tokens.shape[1], dtype=torch.long)
    mask[1, :half] = 0
    padded = torch.stack([tokens[0], torch.cat([torch.zeros_like(tokens[0, :half]), tokens[0, :-half]])])
    result["padded"] = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[1]
    cache = model(tokens[:, :half]).past_key_values
    result["refusal"] = refusal(lambda: model(tokens[:, half:], past_key_values=cache))
    result["bad mask"] = refusal(lambda: model(tokens, attention_mask=mask[:1] * 2))
    cache = model(tokens[:, :half]).past_key_values
    with model.prompt(tokens.shape[1]):
        result["chunks"] = model(tokens[:, half:], past_key_values=cache).logits[0]
    model.config.moba["decode"] = "moba"
    result["greedy, sparse"] = model.generate(tokens, max_new_tokens=new, do_sample=False, eos_token_id=-1)[0, -new:]
    plan = model.config.moba.pop("plan")
    result["no plan"] = refusal(lambda: model(tokens))
    model.config.moba["plan"] = plan
    model.config.moba.pop("decode")
    dense = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    result["dense"] = dense(tokens).logits[0]
    plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)
    result["plain"] = plain(tokens).logits[0]

model.train()
model.gradient_checkpointing_enable()
model(tokens, labels=tokens).loss.backward()
result["gradients"] = {name: p.grad for name, p in model.named_parameters()}
model.eval()

again = f"{answer}.saved"
model.save_pretrained(again)
config = AutoConfig.from_pretrained(again)
result["auto_map"] = config.auto_map
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype=torch.float32).eval()
    result["again"] = model(tokens).logits[0]
try:
    __import__("moba")
except ModuleNotFoundError:
    result["hidden"] = True
torch.save(result, answer)

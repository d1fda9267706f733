"""A PEFT checkpoint into klora, two steps of training, and out again for PEFT.

    python peft_checkpoint_in_and_out.py

The model is a tiny GPT-2 with random weights, and the checkpoint is made here. Pre-trained weights and a folder of
somebody else's adapter go the same way.
"""

from tempfile import TemporaryDirectory

import torch
from klora.lora import attach
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel


def base():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(device).eval()


@torch.no_grad()
def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


device = "cuda" if torch.cuda.is_available() else "cpu"
tokens = torch.randint(64, (2, 16), device=device)

with TemporaryDirectory() as folder:
    config = LoraConfig(r=6, lora_alpha=12, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    theirs = get_peft_model(base(), config).eval()
    theirs.save_pretrained(f"{folder}/from-peft")

    model = base()
    lora = attach(model, slots=4, targets=("c_attn", "c_fc"), rank=8)
    slot = lora.adapters.load("theirs", f"{folder}/from-peft")
    with lora.rows(["theirs", "theirs"]), torch.no_grad():
        loaded = difference(model(tokens).logits, theirs(tokens).logits)
    print(f"on {device}: loaded into slot {slot}, difference {loaded:.1e}")

    optimizer = lora.optimizer(lr=0.01)
    for _ in range(2):
        with lora.rows(["theirs", None]):  # the second row is the base model's
            loss = model(tokens, labels=tokens).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lora.adapters.save("theirs", f"{folder}/from-klora")
    with lora.rows(["theirs", "theirs"]), torch.no_grad():
        ours = model(tokens).logits

    again = PeftModel.from_pretrained(base(), f"{folder}/from-klora").eval()
    print(f"trained: {difference(ours, theirs(tokens).logits):.1e} from what it was")
    print(f"read by PEFT, difference {difference(ours, again(tokens).logits):.1e}")

untouched = base()
detached = lora.detach()
print(f"detached, the base model's logits: {torch.equal(detached(tokens).logits, untouched(tokens).logits)}")

"""A Hugging Face model given as an object: a small llama with random weights, no download.

python -m examples.huggingface_model
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torchweld import optimize


def main() -> None:
    """Optimize, compare with the original at a size that capture never saw, and print what was done."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    fast = optimize(model, (torch.randint(0, 256, (2, 8)),), verify=1)

    ids = torch.randint(0, 256, (1, 13))
    with torch.no_grad():
        difference = (fast(ids).logits - model(ids).logits).abs().max().item()
    print(f"largest difference of a logit from torch's: {difference:.2e}\n")
    print(fast.report.to_markdown())


if __name__ == "__main__":
    main()

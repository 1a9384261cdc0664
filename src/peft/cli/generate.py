# SPDX-License-Identifier: Apache-2.0
"""Short greedy continuations, to see what training changed."""

from __future__ import annotations

from typing import Any


def sample(model: Any, tokenizer: Any, prompts: list[str], tokens: int = 24) -> list[str]:
    import torch

    from .data import method_inputs
    from .models import quiet_loading

    training = model.training
    model.eval()
    said = []
    with torch.no_grad(), quiet_loading():
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            ids = model.generate(
                **inputs,
                **method_inputs(model, 1),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )
            said.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    model.train(training)
    return said

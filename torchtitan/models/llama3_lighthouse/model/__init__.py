"""The Llama-3 model: Lighthouse as its inner attention, rotary embedding, and the loss."""

"""How fast pyllama is, beside others, in shares of what the device can do: see README.md."""

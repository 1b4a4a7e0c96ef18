"""Examples: windows of the corpus chosen for a latent, from pools that are parted before anything is counted.

`selection.Selector` chooses, `render` turns windows into text for a prompt, `partners` pairs latents for the shuffled control.
"""

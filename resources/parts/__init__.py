"""Parts of machines: tables of GPUs, processors, memories, links and drives, and a machine put together from them.

The tables are JSON files beside this one, one part a line, each with the document that its numbers come from. `tables`
reads them, `written` reads parts as people write them ("2x DDR5-5600"), `reached` says how much of a datasheet's figure
is usually reached, by the machines that were measured, and `assemble` makes a profile of parts.
To add a part: one more line.
"""

"""A loss is a page of maths: tensors in, (loss, named statistics) out. One file per method."""

class ShortConv:
    def __init__(self, spec, *, kernel_size=3):
        pass

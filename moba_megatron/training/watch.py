"""stub"""


class Watch:
    def __init__(self, seconds, folder=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass

    def at(self, doing, step):
        pass

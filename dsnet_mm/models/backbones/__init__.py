from .ds_net import DSNet

__all__ = ['DSNet']

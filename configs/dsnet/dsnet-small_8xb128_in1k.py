# DS-Net-S*, ImageNet-1k, 8 GPUs x 128, 300 epochs. Not trained by us.
_base_ = 'dsnet-tiny_8xb128_in1k.py'

model = dict(backbone=dict(arch='small'))

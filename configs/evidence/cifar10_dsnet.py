# CIFAR-10, DS-Net*.
_base_ = '_base_/cifar10.py'

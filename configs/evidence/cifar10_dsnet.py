# CIFAR-10, DS-Net*.
_base_ = '../dsnet/_base_/cifar10.py'

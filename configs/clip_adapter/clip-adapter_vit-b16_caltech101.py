# CLIP-Adapter, CLIP's ViT-B/16, Caltech101, 16 shots, on cached features.
_base_ = '_base_/clip-adapter_vit-b16.py'

task = dict(dataset='caltech101')
model = dict(head=dict(class_names='caltech101'))
train_dataloader = dict(dataset=task)
val_dataloader = dict(dataset=task)
test_dataloader = dict(dataset=task)
few_shot = task

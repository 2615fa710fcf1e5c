# CLIP-Adapter, CLIP's ViT-B/16, SUN397, 16 shots, on cached features.
_base_ = '_base_/clip-adapter_vit-b16.py'

task = dict(dataset='sun397')
model = dict(head=dict(class_names='sun397'))
train_dataloader = dict(dataset=task)
val_dataloader = dict(dataset=task)
test_dataloader = dict(dataset=task)
few_shot = task

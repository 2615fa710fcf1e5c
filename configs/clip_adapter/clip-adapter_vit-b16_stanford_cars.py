# CLIP-Adapter, CLIP's ViT-B/16, StanfordCars, 16 shots, on cached features.
_base_ = '_base_/clip-adapter_vit-b16.py'

task = dict(dataset='stanford_cars')
model = dict(head=dict(class_names='stanford_cars'))
train_dataloader = dict(dataset=task)
val_dataloader = dict(dataset=task)
test_dataloader = dict(dataset=task)
few_shot = task

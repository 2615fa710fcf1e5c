# CLIP-Adapter, CLIP's ViT-B/16, OxfordPets, 16 shots, on cached features.
_base_ = '_base_/clip-adapter_vit-b16.py'

task = dict(dataset='oxford_pets')
model = dict(head=dict(class_names='oxford_pets'))
train_dataloader = dict(dataset=task)
val_dataloader = dict(dataset=task)
test_dataloader = dict(dataset=task)
few_shot = task

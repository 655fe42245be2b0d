"""Whole networks with parts of their own for each task: conversion, merging, exchange of tasks, reports."""

//! `metadata.jsonl` in a folder of images, as the Hub's image folders have it: a JSON object a line, with the `file_name`
//! of an image, and what is known of it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use understudy_models::{Result, checkpoint::read};

use super::{Images, malformed};

/// The file's name.
pub(super) const METADATA: &str = "metadata.jsonl";
/// The largest that is read.
const MOST_BYTES: u64 = 1 << 30;

/// What is known of images.
pub(super) struct Metadata {
    path: PathBuf,
    /// By where each image is.
    lines: HashMap<PathBuf, (usize, Line)>,
}

/// A line; what else it says is passed over.
#[derive(Deserialize)]
struct Line {
    file_name: PathBuf,
    text: Option<String>,
    label: Option<Label>,
}

/// A class.
#[derive(Deserialize)]
#[serde(untagged)]
enum Label {
    Number(u32),
    Name(String),
}

impl Metadata {
    /// What the folder's file says; nothing where there is none.
    ///
    /// # Errors
    /// [`understudy_models::Error::Io`] and [`understudy_models::Error::Format`] naming the file and the line.
    pub(super) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(METADATA);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = read::whole(&path, MOST_BYTES)?;
        let mut lines = HashMap::new();
        for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let refuse = |problem: String| malformed(&path, format!("line {number}: {problem}"));
            let line: Line = serde_json::from_slice(line).map_err(|error| {
                refuse(format!("{error}; write an object such as {{\"file_name\": \"1.png\", \"text\": \"a red apple\"}}"))
            })?;
            let image = folder.join(&line.file_name);
            if let Some((first, _)) = lines.insert(image, (number, line)) {
                return Err(refuse(format!("line {first} tells of the same file; take one out")));
            }
        }
        Ok(Some(Self { path, lines }))
    }

    /// Adds captions, and classes where there are some, to the images of these files.
    ///
    /// # Errors
    /// [`understudy_models::Error::Format`] naming an image without a line, a line without an image, and what is known of
    /// some images alone.
    pub(super) fn add_to(mut self, images: &mut Images, files: &[PathBuf]) -> Result<()> {
        let line = |file: &PathBuf| {
            let line = self.lines.remove(file);
            line.ok_or_else(|| {
                malformed(file, format!("{METADATA} does not tell of it; add a line, or remove it"))
            })
        };
        let lines = files.iter().map(line).collect::<Result<Vec<_>>>()?;
        let refuse = |number: usize, problem: String| {
            malformed(&self.path, format!("line {number}: {problem}"))
        };
        if let Some((number, line)) = self.lines.values().min_by_key(|(number, _)| number) {
            let problem =
                format!("{} is no image in this folder; mend the line", line.file_name.display());
            return Err(refuse(*number, problem));
        }
        let mut captions = Vec::new();
        let (mut numbers, mut names) = (Vec::new(), Vec::new());
        for (_, line) in &lines {
            captions.extend(line.text.clone());
            match &line.label {
                Some(Label::Number(label)) => numbers.push(*label),
                Some(Label::Name(name)) => names.push(name.clone()),
                None => {}
            }
        }
        for (field, count) in [("text", captions.len()), ("label", numbers.len() + names.len())] {
            if count != 0 && count != lines.len() {
                let lacks = |(_, line): &&(usize, Line)| match field {
                    "text" => line.text.is_none(),
                    _ => line.label.is_none(),
                };
                let number = lines.iter().find(lacks).map_or(0, |(number, _)| *number);
                return Err(refuse(
                    number,
                    format!("has no `{field}`, and others have one; give all one, or none"),
                ));
            }
        }
        if !captions.is_empty() {
            images.captions = Some(captions);
        }
        if !numbers.is_empty() && !names.is_empty() {
            let problem = "some labels are numbers and some are names; use one of them";
            return Err(malformed(&self.path, problem));
        }
        if !numbers.is_empty() {
            (images.labels, images.class_names) = (Some(numbers), Vec::new());
        }
        if !names.is_empty() {
            let mut classes = names.clone();
            classes.sort();
            classes.dedup();
            let place = |name| classes.binary_search(name).map(|place| place as u32).ok();
            (images.labels, images.class_names) = (names.iter().map(place).collect(), classes);
        }
        Ok(())
    }
}

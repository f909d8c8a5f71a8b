//! A Dockerfile's stages, and what they copy.

use std::collections::HashMap;

/// Instructions in their order; keywords in upper case, continued lines joined, comments left out.
pub(crate) struct Dockerfile(Vec<(String, String)>);

/// From one `FROM` to the next.
pub(crate) struct Stage<'a> {
    /// After `AS`.
    pub(crate) name: Option<&'a str>,
    image: &'a str,
    pub(crate) instructions: &'a [(String, String)],
}

/// `COPY` or `ADD`.
pub(crate) struct Copy<'a> {
    /// The stage or image that `--from` names; without one it is the context.
    pub(crate) from: Option<&'a str>,
    pub(crate) sources: Vec<&'a str>,
}

impl Dockerfile {
    pub(crate) fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
        let instructions =
            joined.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| {
                assert!(!line.contains("<<"), "{line}: here-documents are not read here");
                let (keyword, rest) =
                    line.split_once(char::is_whitespace).expect("an instruction's arguments");
                (keyword.to_uppercase(), rest.trim().to_owned())
            });
        Self(instructions.collect())
    }

    pub(crate) fn stages(&self) -> impl Iterator<Item = Stage<'_>> {
        let begins = |index: &usize| self.0[*index].0 == "FROM";
        let starts: Vec<usize> = (0..self.0.len()).filter(begins).collect();
        let ends = starts.clone().into_iter().skip(1).chain([self.0.len()]);
        starts.into_iter().zip(ends).map(|(start, end)| {
            let mut words =
                self.0[start].1.split_whitespace().filter(|word| !word.starts_with("--"));
            let image = words.next().expect("FROM an image");
            let name =
                words.next().filter(|word| word.eq_ignore_ascii_case("as")).and(words.next());
            Stage { name, image, instructions: &self.0[start + 1..end] }
        })
    }

    /// The image that a stage stands on, with the arguments' defaults in it.
    pub(crate) fn image(&self, stage: &str) -> String {
        let arguments: HashMap<&str, &str> = (self.0.iter())
            .take_while(|(keyword, _)| keyword != "FROM")
            .filter(|(keyword, _)| keyword == "ARG")
            .filter_map(|(_, argument)| argument.split_once('='))
            .collect();
        let stage = self
            .stages()
            .find(|other| other.name == Some(stage))
            .unwrap_or_else(|| panic!("no stage {stage}"));
        let mut image = stage.image.to_owned();
        for (name, value) in arguments {
            image = image.replace(&format!("${{{name}}}"), value);
        }
        assert!(!image.contains('$'), "{image}: an argument without a default");
        image
    }

    pub(crate) fn copies(&self) -> impl Iterator<Item = Copy<'_>> {
        self.0.iter().filter(|(keyword, _)| keyword == "COPY" || keyword == "ADD").map(
            |(_, arguments)| {
                assert!(
                    !arguments.contains('['),
                    "COPY {arguments}: lists in brackets are not read here"
                );
                let (flags, mut paths): (Vec<&str>, Vec<&str>) =
                    arguments.split_whitespace().partition(|word| word.starts_with("--"));
                paths.pop().expect("a place to copy to");
                Copy {
                    from: flags.iter().find_map(|flag| flag.strip_prefix("--from=")),
                    sources: paths,
                }
            },
        )
    }
}

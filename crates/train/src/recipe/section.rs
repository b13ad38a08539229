//! The macro that keeps a recipe's keys, defaults and documentation in one place.

/// What a key holds, to read `--set key=value` without quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// Text: taken as it is written.
    Text,
    /// Text, or a list of it in brackets.
    TextOrList,
    /// Text, or a whole number.
    TextOrInteger,
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// `true` or `false`.
    Boolean,
    /// A list in brackets.
    List,
    /// A table whose keys the recipe chooses.
    Map,
    /// A table with keys of its own, listed under its path.
    Section,
}

impl KeyKind {
    /// For messages: "expected …".
    pub fn describe(self) -> &'static str {
        match self {
            KeyKind::Text => "text",
            KeyKind::TextOrList => "text or a list such as [\"a\", \"b\"]",
            KeyKind::TextOrInteger => "text or a whole number",
            KeyKind::Integer => "a whole number",
            KeyKind::Number => "a number",
            KeyKind::Boolean => "true or false",
            KeyKind::List => "a list such as [\"a\", \"b\"]",
            KeyKind::Map => "a table such as { name = 8 }",
            KeyKind::Section => "a table",
        }
    }
}

/// One key of a recipe.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Dotted, for example `train.learning_rate`.
    pub path: &'static str,
    /// What it holds.
    pub kind: KeyKind,
    /// Whether a recipe must give it.
    pub required: bool,
    /// What it means, one or more sentences.
    pub doc: &'static str,
}

/// Declares one section: the struct with its documentation, its defaults and its [`Key`]s.
///
/// Each field reads `/// doc` `name: Type = default => Kind;`, with `required` after the kind
/// where a recipe must give the key.
macro_rules! section {
    (
        $(#[doc = $section_doc:literal])+
        $name:ident at $path:literal {
            $(
                $(#[doc = $doc:literal])+
                $(#[serde($($serde:tt)+)])?
                $field:ident : $type:ty = $default:expr => $kind:ident $($required:ident)? ;
            )+
        }
    ) => {
        $(#[doc = $section_doc])+
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $(
                $(#[doc = $doc])+
                $(#[serde($($serde)+)])?
                pub $field: $type,
            )+
        }

        impl Default for $name {
            fn default() -> Self {
                $name { $($field: $default,)+ }
            }
        }

        impl $name {
            pub(crate) const KEYS: &'static [Key] = &[
                $(Key {
                    path: concat!($path, stringify!($field)),
                    kind: KeyKind::$kind,
                    required: section!(@required $($required)?),
                    doc: concat!($($doc),+),
                },)+
            ];
        }
    };
    (@required) => { false };
    (@required required) => { true };
}
pub(crate) use section;
